"""An engine's speed, estimated while it works. No clock: time is an argument, in seconds.

A step of an engine with continuous batching costs

    step_s + token_s x (prompt tokens it computes) + seq_s x (calls that get a token in it),

and many steps cost the sum. `SpeedMeter` estimates the three by least squares over the reported stretches of work, of
any length. Newer ones have more weight.
"""

from __future__ import annotations

from rsm.broker.protocol.snapshot import Speed

# Before the first measurement: the order of magnitude of an 8B model on a large GPU.
PRIOR = Speed(step_s=0.01, token_s=100e-6, seq_s=50e-6)
# The weight of the last estimate relative to the observed work. It decides what that work does not determine.
_DAMPING = 1e-3
# A stretch that took more than this many times as long as expected counts less (Huber, 1964), for example because
# kernels were compiled on first use or the process was stopped. Beyond this factor its influence no longer grows.
_OUTLIER = 4.0
# The work to observe before the estimate counts as measured: seconds, and steps.
_ENOUGH_S, _ENOUGH_STEPS = 0.05, 20
# The most that one stretch ages older ones, as a share of the half-life.
_MOST_AGING = 0.01
# The estimate is recomputed after this share of more work, at the latest after this many seconds of work.
_RECOMPUTE_SHARE, _RECOMPUTE_S = 0.05, 0.5

_Matrix = list[list[float]]


class SpeedMeter:
    """Least squares with forgetting, each stretch weighted by 1 / expected time, none of the three below zero.

    Args:
        half_life_s: seconds of work after which an observation counts half, but at least a hundred stretches. Idle
            time does not count.
    """

    def __init__(self, half_life_s: float = 60.0, prior: Speed = PRIOR) -> None:
        self._half_life_s = half_life_s
        self._speed = prior
        # Decaying sums over stretches of the pairwise products of: steps, prompt tokens, tokens out, seconds.
        self._ss = self._sp = self._so = self._pp = self._po = self._oo = 0.0
        self._st = self._pt = self._ot = 0.0
        self._seconds = 0.0
        self._steps = self._prompts = self._outputs = 0.0
        self._recompute_at = 0.0

    def add(self, seconds: float, steps: float, prompt_tokens: float, tokens_out: float, weight: float = 1.0) -> None:
        """Adds a stretch of work: `steps` steps took `seconds`. `tokens_out` counts one per call and step.

        weight: less than 1 for overlapping stretches.
        """
        if seconds <= 0 or steps + prompt_tokens + tokens_out <= 0:
            return
        old = self._speed
        expected = steps * old.step_s + prompt_tokens * old.token_s + tokens_out * old.seq_s or seconds
        kept: float = 0.5 ** (weight * min(seconds / self._half_life_s, _MOST_AGING))
        if seconds > _OUTLIER * expected and self.measured:
            weight *= _OUTLIER * expected / seconds
        weight /= expected
        s, p, o = weight * steps, weight * prompt_tokens, weight * tokens_out
        self._ss = kept * self._ss + s * steps
        self._sp = kept * self._sp + s * prompt_tokens
        self._so = kept * self._so + s * tokens_out
        self._st = kept * self._st + s * seconds
        self._pp = kept * self._pp + p * prompt_tokens
        self._po = kept * self._po + p * tokens_out
        self._pt = kept * self._pt + p * seconds
        self._oo = kept * self._oo + o * tokens_out
        self._ot = kept * self._ot + o * seconds
        self._seconds += seconds
        self._steps += steps
        self._prompts += prompt_tokens
        self._outputs += tokens_out
        if self._seconds >= self._recompute_at:
            self._speed = self._solved()
            self._recompute_at = self._seconds + min(_RECOMPUTE_SHARE * self._seconds, _RECOMPUTE_S)

    @property
    def measured(self) -> bool:
        """Whether it has seen enough work for an estimate, with some prompts and some output."""
        return self._seconds > _ENOUGH_S and self._steps > _ENOUGH_STEPS and self._prompts > 0 and self._outputs > 0

    @property
    def speed(self) -> Speed:
        """The estimate; the prior where nothing was observed. May be read from any thread."""
        return self._speed

    def _solved(self) -> Speed:
        """Solves for the estimate. What the work does not determine stays the same: for example, with a constant batch
        size, the cost of a step is not separable from the cost per call."""
        last = (self._speed.step_s, self._speed.token_s, self._speed.seq_s)
        products = [[self._ss, self._sp, self._so], [self._sp, self._pp, self._po], [self._so, self._po, self._oo]]
        times = [self._st, self._pt, self._ot]
        for i in range(3):
            damping = _DAMPING * products[i][i]
            products[i][i] += damping
            times[i] += damping * last[i]
        return Speed(*_non_negative(products, times, last))


def _non_negative(a: _Matrix, b: list[float], last: tuple[float, ...]) -> list[float]:
    """Solves a x = b by least squares under x >= 0, setting the most negative unknown to zero first. The unknown of a
    row of zeros stays the same."""
    x = [old if a[i][i] <= 0 else 0.0 for i, old in enumerate(last)]
    free = [i for i in range(len(b)) if a[i][i] > 0]
    while free:
        found = _solve([[a[i][j] for j in free] for i in free], [b[i] for i in free])
        worst = min(range(len(free)), key=found.__getitem__)
        if found[worst] >= 0:
            for i, value in zip(free, found, strict=True):
                x[i] = value
            break
        del free[worst]
    return x


def _solve(a: _Matrix, b: list[float]) -> list[float]:
    """Gaussian elimination; `a` is positive definite, so no pivoting is needed."""
    n = len(b)
    for k in range(n):
        for i in range(k + 1, n):
            factor = a[i][k] / a[k][k]
            for j in range(k, n):
                a[i][j] -= factor * a[k][j]
            b[i] -= factor * b[k]
    for k in reversed(range(n)):
        b[k] = (b[k] - sum(a[k][j] * b[j] for j in range(k + 1, n))) / a[k][k]
    return b


class Mean:
    """A recent mean, over about the last `n` values."""

    def __init__(self, n: float = 50.0) -> None:
        self._n = n
        self._count = 0.0
        self.value = 0.0

    def add(self, value: float) -> None:
        self._count = min(self._count + 1, self._n)
        self.value += (value - self.value) / self._count


class StepWindow:
    """Groups the steps of an engine that reports a long prompt's tokens only with its last step."""

    def __init__(self, meter: SpeedMeter, least_s: float = 2.0) -> None:
        self._meter = meter
        self._least_s = least_s
        self._sums = [0.0] * 4

    def add(self, seconds: float, prompt_tokens: int, tokens_out: int) -> None:
        """One step."""
        for i, value in enumerate((seconds, 1.0, prompt_tokens, tokens_out)):
            self._sums[i] += value
        if self._sums[0] >= self._least_s:
            self.flush()

    def flush(self) -> None:
        """Passes the steps on, when the window is full or the engine is idle and no prompt is half done."""
        self._meter.add(*self._sums)
        self._sums = [0.0] * 4
