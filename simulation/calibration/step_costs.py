"""Fits the step costs of the modelled engine (`SimTimes`) to the steps of a real one.

Weighted least squares without negative costs; the weights make a step of 5 ms count as much as one of 500 ms. It is
repeated with less weight on outliers, such as a kernel compiled on first use, until it converges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from rsm.workers.backends.vllm.steps import Step

_ROUNDS = 30
_NEAR = 1e-3  # the relative error below which all steps count the same

# The factor of each cost.
COSTS: dict[str, Callable[[Step], float]] = {
    "step_s": lambda s: 1.0,
    "prefill_token_s": lambda s: s.prefill_tokens,
    "decode_seq_s": lambda s: s.decode_seqs,
    "context_token_s": lambda s: s.context_tokens,
    "prefill_pair_s": lambda s: s.prefill_pairs,
}


@dataclass(frozen=True, slots=True)
class Timed:
    step: Step
    seconds: float


@dataclass(frozen=True, slots=True)
class Error:
    """The error of a fit: relative errors of single steps, and the total modelled time over the measured time."""

    steps: int
    median: float
    p90: float
    total: float


def durations(steps: Sequence[Step]) -> list[Timed]:
    """The duration of each step: from the end of the last step, if calls were left then, otherwise from its planning.

    So the time between two steps belongs to the second. Steps without work are omitted; with asynchronous scheduling
    there is one after the last call has ended.
    """
    timed, end, left = [], 0.0, 0
    for s in steps:
        timed.append(Timed(s, s.done_from - (end if left else max(s.planned_from, end))))
        end, left = s.done_from, s.left
    return [t for t in timed if t.step.prefill_tokens + t.step.decode_seqs]


def fit(taken: Sequence[Timed], names: Sequence[str]) -> dict[str, float]:
    """The costs, in seconds, that fit these steps best.

    Raises:
        ValueError: the steps are too similar to separate the costs.
    """
    rows = [[COSTS[name](t.step) for name in names] for t in taken]
    weights = [1 / t.seconds for t in taken]
    for _ in range(_ROUNDS):
        found = _not_negative(rows, [t.seconds for t in taken], weights)
        far = [abs(_dot(row, found) - t.seconds) / t.seconds for row, t in zip(rows, taken, strict=True)]
        weights = [1 / t.seconds / max(off, _NEAR) ** 0.5 for t, off in zip(taken, far, strict=True)]
    return dict(zip(names, found, strict=True))


def error(costs: dict[str, float], taken: Sequence[Timed]) -> Error:
    modelled = [sum(cost * COSTS[name](t.step) for name, cost in costs.items()) for t in taken]
    far = sorted(abs(m - t.seconds) / t.seconds for m, t in zip(modelled, taken, strict=True))
    total = sum(modelled) / sum(t.seconds for t in taken)
    return Error(len(far), median(far), far[int(0.9 * (len(far) - 1))], total)


def _not_negative(rows: list[list[float]], values: list[float], weights: list[float]) -> list[float]:
    """Least squares. Costs below zero are set to zero, and the others are fitted again."""
    kept = list(range(len(rows[0])))
    while True:
        chosen = [[row[i] * w for i in kept] for row, w in zip(rows, weights, strict=True)]
        found = _least_squares(chosen, [v * w for v, w in zip(values, weights, strict=True)])
        if min(found) >= 0:
            return [dict(zip(kept, found, strict=True)).get(i, 0.0) for i in range(len(rows[0]))]
        kept = [i for i, cost in zip(kept, found, strict=True) if cost >= 0]


def _least_squares(rows: list[list[float]], values: list[float]) -> list[float]:
    """Solves the normal equations, with each column scaled to length 1, by Gaussian elimination with pivoting."""
    size = len(rows[0])
    scale = [sum(row[i] ** 2 for row in rows) ** 0.5 or 1.0 for i in range(size)]
    matrix = [[sum(row[i] * row[j] for row in rows) / scale[i] / scale[j] for j in range(size)] for i in range(size)]
    right = [sum(row[i] * v for row, v in zip(rows, values, strict=True)) / scale[i] for i in range(size)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(matrix[k][i]))
        if abs(matrix[pivot][i]) < 1e-9:
            raise ValueError("These steps are too similar to separate their costs; measure more different ones.")
        matrix[i], matrix[pivot], right[i], right[pivot] = matrix[pivot], matrix[i], right[pivot], right[i]
        for k in range(i + 1, size):
            share = matrix[k][i] / matrix[i][i]
            matrix[k] = [a - share * b for a, b in zip(matrix[k], matrix[i], strict=True)]
            right[k] -= share * right[i]
    found = [0.0] * size
    for i in reversed(range(size)):
        found[i] = (right[i] - _dot(matrix[i][i + 1 :], found[i + 1 :])) / matrix[i][i]
    return [f / s for f, s in zip(found, scale, strict=True)]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
