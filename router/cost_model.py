"""How long a call would take on each engine: the model behind policy `cost` and behind stealing. Times in seconds.

    cost = until it can start + its uncached tokens / prefill speed + its answer / decode speed + the delay of others

1. It starts when the prompts ahead of it are computed, those of running calls and of waiting calls that the queue's
   order has before it, and, where all slots are taken, when enough calls have ended.
2. Uncached are the tokens of its prompt that its session has not left on the engine, or that have been evicted since:
   an engine keeps the latest of what it computed, as much as its KV cache holds.
3. All calls of an engine share its steps: a prompt delays those that run, and those that wait behind it.

Speeds are the engines' own, as they have learned them; an engine that has not yet is taken for as fast as the others.
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

# An engine that has told nothing, in a fleet that has told nothing: an 8B model on a large GPU, by order of magnitude.
UNKNOWN = Speed(step_s=0.01, token_s=100e-6, seq_s=50e-6)
UNKNOWN_ANSWER = 128.0
# How many calls of a session its own mean must be of to count as much as the fleet's.
_PRIOR_CALLS = 2.0
# How much of its prompt a call is believed to share with one of its session that an engine has, but has not ended yet.
_SHARED = 0.5
# Steps until a call has its first token, if nothing is ahead of it: half of one that is under way, and its own.
_STEPS = 1.5
# A cache that was left alone for so long is wanted again with an even chance.
_RETURN_S = 60.0
# Of how many engines, at most, besides the chosen one, and in how many bytes a call's record tells the costs.
_COSTS_KEPT, _COSTS_BYTES = 8, 192
# How long the fleet's means hold, in seconds.
_MEAN_S = 1.0


@dataclass(frozen=True, slots=True)
class Weights:
    """What may be turned in the model.

    Attributes:
        others: how much a second of delay of another call counts; 0 = each call for itself.
    """

    others: float = 1.0
    keep: float = 1.0


class _Load:
    """One engine as it was seen, boiled down to what a call costs there."""

    __slots__ = (
        "_behind",
        "_crowd_s",
        "_each",
        "_free",
        "_meet",
        "_pace",
        "_step_s",
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
        # What one call more costs the engine while all slots are taken, prompts aside: its share of the steps.
        self._each = answer * (speed.step_s / slots + speed.seq_s)
        self._free = slots - view.running
        self._pace = speed.step_s + (batch + 1) * speed.seq_s
        # Those that run now will be gone, on the average, when as many tokens are out as an answer has.
        self._meet = answer if not waiting else inf
        self._crowd_s = (batch + weights.others * min(view.running, slots)) * speed.seq_s
        self.prompt_s = speed.token_s * (1 + others + weights.keep * _RETURN_S / (_RETURN_S + view.cache_age_s))
        self._waits: dict[int, float] = {}

    def cost(self, rank: int, tokens: int, answer: float) -> float:
        """Of a call with nothing cached here."""
        return (
            self.wait(rank) + tokens * self.prompt_s + answer * self._step_s + min(answer, self._meet) * self._crowd_s
        )

    def wait(self, rank: int) -> float:
        """Until a call of this rank can start, if it came now."""
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
        wait += _STEPS * self._pace
        return wait + missing * self._each if missing > 0 else wait


class CostModel:
    """Keeps what it made of each engine until that engine is seen anew. One in each router; not for several threads."""

    def __init__(self, weights: Weights | None = None) -> None:
        self.weights = weights or Weights()
        self._loads: dict[str, _Load] = {}
        self._speed = UNKNOWN
        self._answer = UNKNOWN_ANSWER
        self._mean_until = -inf

    def costs(
        self, call: CallView, engines: Sequence[EngineView], session: SessionView, now: float
    ) -> dict[str, float]:
        """What the call would take on each engine. `now`: seconds, on any clock that only goes forward."""
        self.look_around(engines, now)
        return self.reckon(call, engines, session)

    def reckon(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> dict[str, float]:
        """The same, by the means that were found when the model last looked around."""
        loads = self._loads_of(engines)
        rank = rank_of(call.priority, session.level)
        tokens, answer = call.prompt_tokens, self.answer(session)
        costs = {load.view.id: load.cost(rank, tokens, answer) for load in loads}
        for e in {*session.resident, session.bound} & costs.keys():
            load = self._loads[e]
            costs[e] -= reusable(call, load.view, session) * load.prompt_s
        return costs

    def answer(self, session: SessionView) -> float:
        """How many tokens the session's next answer will have: its own mean, and that of all as far as it has none."""
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

    def look_around(self, engines: Sequence[EngineView], now: float) -> None:
        """What is not known of one engine is believed to be as it is in the mean; looks if it has not of late."""
        if now < self._mean_until:
            return
        speeds = [e.speed for e in engines if e.speed]
        answers = [e.completion_tokens for e in engines if e.completion_tokens]
        if speeds:
            self._speed = Speed(
                fmean(s.step_s for s in speeds), fmean(s.token_s for s in speeds), fmean(s.seq_s for s in speeds)
            )
            # What was made of engines that have told nothing was made of an older mean.
            self._loads = {i: load for i, load in self._loads.items() if load.view.speed}
        if answers:
            self._answer = fmean(answers)
        self._mean_until = now + _MEAN_S


def reusable(call: CallView, engine: EngineView, session: SessionView) -> int:
    """Tokens of the call's prompt that its session should have left in the engine's cache."""
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
    """Costs for a record, `ENGINE=MS ENGINE=MS …`: the chosen engine first, then the cheapest, within a bound."""
    if not costs:
        return ""
    others = nsmallest(_COSTS_KEPT, (e for e in costs if e != chosen), key=costs.__getitem__)
    kept, room = [], _COSTS_BYTES
    for e in (chosen, *others):
        word = f"{e}={costs[e] * 1000:.0f}"
        room -= len(word) + 1
        if room < 0:
            break
        kept.append(word)
    return " ".join(kept)
