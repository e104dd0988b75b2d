"""Metrics of a run, from the perspective of its programs.

The main metric is a program's latency per token: its response time, minus the time that people and tools took on its
critical path, divided by its generated tokens (section 6.1 of arXiv 2502.13965). The critical path is the chain of
calls that the program's end waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from statistics import fmean
from typing import Any, Self

from rsm.broker.protocol.rules import RUN_FLOOR_MS
from rsm.simulation.results import CallTimes, ProgramTimes
from rsm.simulation.workload.programs import CallSpec, ProgramSpec
from rsm.workers.backends.sim.engine import SimTimes

# A program starved if it never ended, or if its calls in total waited this many times as long as they ran (counted as
# at least 1 s). The paper's rule against starvation limits that ratio to beta. The threshold here is higher, because
# programs that are promoted at the same time also wait for each other.
STARVED_TIMES, RUN_FLOOR_S = 20.0, RUN_FLOOR_MS / 1000


@dataclass(frozen=True, slots=True)
class ProgramRun:
    """The result of one program. Times in seconds; `response_s` is None if it never ended.

    Attributes:
        delay_s: time that people and tools took on its critical path.
        ideal_s: duration of its longest chain of calls, alone on an engine that never evicts cache; without delays.
        longest_wait_s: longest wait of any of its calls, from being ready to first being served.
        waited_s, ran_s: totals over its calls, before and after they were first served.
    """

    id: str
    kind: str
    arrival_s: float
    response_s: float | None
    delay_s: float
    ideal_s: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    longest_wait_s: float
    waited_s: float
    ran_s: float

    @property
    def served_s(self) -> float:
        """Response time minus delays; infinite for an unfinished program."""
        return float("inf") if self.response_s is None else max(0.0, self.response_s - self.delay_s)

    @property
    def per_token_s(self) -> float:
        return self.served_s / self.output_tokens

    @property
    def slowdown(self) -> float:
        return self.served_s / self.ideal_s

    @property
    def starved(self) -> bool:
        if self.response_s is None:
            return True
        return self.waited_s > STARVED_TIMES * max(self.ran_s, RUN_FLOOR_S)

    @classmethod
    def of(cls, program: ProgramTimes, times: SimTimes, until_s: float) -> Self:
        """Computes the result of a program.

        Args:
            times: costs of an idle engine.
            until_s: when the run ended or was stopped.
        """
        spec = program.spec
        calls = sorted(program.calls, key=lambda c: c.index)
        ends = [c.reported_s for c in calls if c.reported_s is not None]
        done = len(ends) == len(spec.calls)
        waits = [(until_s if c.started_s is None else c.started_s) - c.ready_s for c in calls]
        return cls(
            id=spec.id,
            kind=spec.kind,
            arrival_s=spec.arrival_s,
            response_s=max(ends) - spec.arrival_s if done else None,
            delay_s=_delay_on_path(spec.calls, ends) if done else 0.0,
            ideal_s=ideal_s(spec, times),
            output_tokens=spec.output_tokens,
            prompt_tokens=sum(c.prompt_tokens for c in calls if c.reported_s is not None),
            cached_tokens=sum(c.cached_tokens for c in calls if c.reported_s is not None),
            longest_wait_s=max(waits, default=0.0),
            waited_s=sum(waits),
            ran_s=sum(_ran_s(c, until_s) for c in calls),
        )


def _ran_s(call: CallTimes, until_s: float) -> float:
    if call.started_s is None:
        return 0.0
    return (until_s if call.reported_s is None else call.reported_s) - call.started_s


def _delay_on_path(calls: Sequence[CallSpec], ends: Sequence[float]) -> float:
    """Sums the delays on the critical path, from the last call back: each call waited for its latest predecessor."""
    at: int | None = max(range(len(calls)), key=lambda n: ends[n])
    total = 0.0
    while at is not None:
        total += calls[at].delay_s
        at = max(calls[at].after, key=lambda n: ends[n], default=None)
    return total


def ideal_s(spec: ProgramSpec, times: SimTimes) -> float:
    """Returns the seconds of the program's longest chain of calls on its own engine, which computes each text once.

    The system prompt counts as new in the program's first call, so even a program of one call has some work.
    """
    seen: dict[int, int] = {}
    ends: list[float] = []
    for call in spec.calls:
        new = 0
        for segment in call.prompt:
            new += max(0, segment.tokens - seen.get(segment.text, 0))
            seen[segment.text] = max(segment.tokens, seen.get(segment.text, 0))
        if call.answer:
            seen[call.answer] = call.output_tokens
        step = times.step_s + times.decode_seq_s + call.prompt_tokens * times.context_token_s
        took = new * times.prefill_token_s + call.output_tokens * step
        ends.append(took + max((ends[n] for n in call.after), default=0.0))
    return max(ends)


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a run. Times in seconds; `per_token` is a program's latency per token, `jct` its response time.

    Attributes:
        per_s: completed programs per second, from the first arrival to the last end.
        hit_rate: share of the prompt tokens that were found in a cache.
        jain: Jain's index of the programs' slowdowns over an idle engine: 1 = all equal, 1/n = one bears it all.
    """

    programs: int
    unfinished: int
    starved: int
    per_s: float
    per_token_mean: float
    per_token_p95: float
    per_token_p99: float
    jct_mean: float
    jct_p95: float
    jct_p99: float
    slowdown_mean: float
    slowdown_p99: float
    longest_wait: float
    hit_rate: float
    jain: float
    by_kind: dict[str, float]  # mean latency per token

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, runs: Iterable[ProgramRun]) -> Self:
        runs = list(runs)
        done = [r for r in runs if r.response_s is not None]
        per_token = sorted(r.per_token_s for r in runs)
        jct = sorted(float("inf") if r.response_s is None else r.response_s for r in runs)
        slow = sorted(r.slowdown for r in runs)
        kinds = sorted({r.kind for r in runs})
        return cls(
            programs=len(runs),
            unfinished=len(runs) - len(done),
            starved=sum(r.starved for r in runs),
            per_s=_rate(done),
            per_token_mean=fmean(per_token),
            per_token_p95=quantile(per_token, 0.95),
            per_token_p99=quantile(per_token, 0.99),
            jct_mean=fmean(jct),
            jct_p95=quantile(jct, 0.95),
            jct_p99=quantile(jct, 0.99),
            slowdown_mean=fmean(slow),
            slowdown_p99=quantile(slow, 0.99),
            longest_wait=max(r.longest_wait_s for r in runs),
            hit_rate=sum(r.cached_tokens for r in runs) / max(1, sum(r.prompt_tokens for r in runs)),
            jain=jain([r.slowdown for r in done]),
            by_kind={k: fmean(r.per_token_s for r in runs if r.kind == k) for k in kinds},
        )


def _rate(done: Sequence[ProgramRun]) -> float:
    ends = [r.arrival_s + r.response_s for r in done if r.response_s is not None]
    span = max(ends) - min(r.arrival_s for r in done) if ends else 0.0
    return len(done) / span if span > 0 else 0.0


def quantile(ordered: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least this share of the values do not exceed."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)]


def jain(values: Sequence[float]) -> float:
    """Returns the index of Jain, Chiu and Hawe (1984): (sum of x)² / (n · sum of x²). 1 for no values."""
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0
