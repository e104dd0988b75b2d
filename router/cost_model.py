"""Estimates how long a call would take on each engine, for policy `cost` and for work stealing. Times in seconds.

    cost = wait until start + uncached tokens / prefill speed + answer / decode speed + delay of other calls

1. A call starts when the prompts ahead of it are computed: those of running calls, and of waiting calls before it in
   the queue. If all slots are used, enough calls must also have ended.
2. The uncached tokens of its prompt are those that its session has not left on the engine, or that have been evicted
   since. An engine keeps the latest tokens that it computed, as many as its KV cache can hold.
3. All calls of an engine share its steps, so a prompt delays the running calls, and those that wait after it.

Each engine measures its own speed. An engine without a measurement is assumed to have the mean speed of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf
from statistics import fmean

from rsm.broker.protocol.rules import NEW_CACHE, rank_of
from rsm.broker.protocol.snapshot import EngineView, SessionView, Speed
from rsm.router.views import CallView

# Used while no engine has reported a speed: the order of magnitude of an 8B model on a large GPU.
UNKNOWN = Speed(step_s=0.01, token_s=100e-6, seq_s=50e-6)
UNKNOWN_ANSWER = 128.0
# After this many calls, a session's own mean counts as much as the fleet's.
_PRIOR_CALLS = 2.0
# The fraction of its prompt that a call probably shares with an unfinished call of its session on the same engine.
_SHARED = 0.5
# Steps until the first token of a call with nothing ahead of it: half of the step in progress, and its own step.
_STEPS = 1.5
# A cache that was unused for this long is needed again with probability 1/2.
_RETURN_S = 60.0
# The costs in a call's record: at most this many engines besides the chosen one, and this many bytes.
_COSTS_KEPT, _COSTS_BYTES = 8, 192
# How long the fleet's means are used before they are computed again, in seconds.
_MEAN_S = 1.0


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of the model.

    Attributes:
        others: the weight of a second of delay of another call; 0 = other calls do not count.
        keep: the weight of evicting tokens that the engine's cache may need again; 0 = they do not count.
    """

    others: float = 1.0
    keep: float = 1.0


class _Load:
    """One engine's view, reduced to the numbers that determine a call's cost there."""

    __slots__ = (
        "_crowd_s",
        "_free",
        "_overlap",
        "_per_call_s",
        "_step_s",
        "_step_time",
        "_token_s",
        "_waits",
        "prompt_s",
        "view",
    )

    def __init__(self, view: EngineView, speed: Speed, answer: float, weights: Weights) -> None:
        self.view = view
        slots = max(view.max_num_seqs, 1)
        waiting = sum(a.calls for a in view.ahead.values()) if view.ahead else 0
        batch = min(slots, view.running + waiting)
        others = weights.others * (view.running + waiting)
        self._token_s, self._step_s = speed.token_s, speed.step_s + speed.seq_s
        # The time of one more call while all slots are used, without its prompt: its share of the steps.
        self._per_call_s = answer * (speed.step_s / slots + speed.seq_s)
        self._free = slots - view.running
        self._step_time = speed.step_s + (batch + 1) * speed.seq_s
        # On average, the calls that run now will have ended after as many tokens as an answer has.
        self._overlap = answer if not waiting else inf
        self._crowd_s = (batch + weights.others * min(view.running, slots)) * speed.seq_s
        self.prompt_s = speed.token_s * (1 + others + weights.keep * _RETURN_S / (_RETURN_S + view.cache_age_s))
        self._waits: dict[int, float] = {}

    def cost(self, rank: int, tokens: int, answer: float) -> float:
        """The cost of a call that has nothing cached here."""
        return (
            self.wait(rank)
            + tokens * self.prompt_s
            + answer * self._step_s
            + min(answer, self._overlap) * self._crowd_s
        )

    def wait(self, rank: int) -> float:
        """The time until a call of this rank could start, if it arrived now."""
        found = self._waits.get(rank)
        if found is None:
            found = self._waits[rank] = self._wait(rank)
        return found

    def _wait(self, rank: int) -> float:
        calls = tokens = 0
        for r, ahead in self.view.ahead.items():
            if r <= rank:
                calls += ahead.calls
                tokens += ahead.tokens
        wait = self.view.prefill_s + tokens * self._token_s
        missing = calls + 1 - self._free
        wait += _STEPS * self._step_time
        return wait + missing * self._per_call_s if missing > 0 else wait


class CostModel:
    """Caches the numbers of each engine until it has a new view. One per router; not thread-safe."""

    def __init__(self, weights: Weights | None = None) -> None:
        self.weights = weights or Weights()
        self._loads: dict[str, _Load] = {}
        self._speed = UNKNOWN
        self._answer = UNKNOWN_ANSWER
        self._mean_until = -inf

    def costs(
        self, call: CallView, engines: Sequence[EngineView], session: SessionView, now: float
    ) -> dict[str, float]:
        """The time that the call would take on each engine. `now`: seconds, on any monotonic clock."""
        self.update_means(engines, now)
        return self.estimate(call, engines, session)

    def estimate(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> dict[str, float]:
        """Like `costs`, without updating the fleet's means first."""
        loads = self._loads_of(engines)
        rank = rank_of(call.priority, session.level)
        tokens, answer = call.prompt_tokens, self.answer(session)
        costs = {load.view.id: load.cost(rank, tokens, answer) for load in loads}
        for e in {*session.resident, session.bound} & costs.keys():
            load = self._loads[e]
            costs[e] -= reusable(call, load.view, session) * load.prompt_s
        return costs

    def answer(self, session: SessionView) -> float:
        """The expected tokens of the session's next answer: its own mean, weighted with the fleet's mean."""
        n = session.completed
        return (n * session.completion_tokens + _PRIOR_CALLS * self._answer) / (n + _PRIOR_CALLS)

    def _loads_of(self, engines: Sequence[EngineView]) -> list[_Load]:
        known = self._loads
        loads = []
        for view in engines:
            load = known.get(view.id)
            if load is None or load.view is not view:
                load = known[view.id] = _Load(view, view.speed or self._speed, self._answer, self.weights)
            loads.append(load)
        return loads

    def update_means(self, engines: Sequence[EngineView], now: float) -> None:
        """Updates the fleet's means, which stand in for unknown values of an engine, unless they are recent."""
        if now < self._mean_until:
            return
        speeds = [e.speed for e in engines if e.speed]
        answers = [e.completion_tokens for e in engines if e.completion_tokens]
        if speeds:
            self._speed = Speed(
                fmean(s.step_s for s in speeds), fmean(s.token_s for s in speeds), fmean(s.seq_s for s in speeds)
            )
            # The numbers of engines without a measured speed come from an older mean.
            self._loads = {i: load for i, load in self._loads.items() if load.view.speed}
        if answers:
            self._answer = fmean(answers)
        self._mean_until = now + _MEAN_S


def reusable(call: CallView, engine: EngineView, session: SessionView) -> int:
    """Tokens of the call's prompt that should be in the engine's cache from earlier calls of its session."""
    left = session.resident.get(engine.id, 0)
    if not left:
        return int(_SHARED * call.prompt_tokens) if session.bound == engine.id else 0
    use = session.used.get(engine.id)
    if use is not None and use.computed is not None:
        since = engine.computed - use.computed
        if engine.kv_tokens or since >= NEW_CACHE:
            left = min(left, engine.kv_tokens - since)
    return max(0, min(int(left * engine.reuse_found), call.prompt_tokens - 1))


def costs_text(costs: Mapping[str, float], chosen: str) -> str:
    """Costs for a record, `ENGINE=MS ENGINE=MS …`: the chosen engine first, then the cheapest, up to a limit."""
    if not costs:
        return ""
    others = nsmallest(_COSTS_KEPT, (e for e in costs if e != chosen), key=costs.__getitem__)
    kept, left = [], _COSTS_BYTES
    for e in (chosen, *others):
        word = f"{e}={costs[e] * 1000:.0f}"
        left -= len(word) + 1
        if left < 0:
            break
        kept.append(word)
    return " ".join(kept)
