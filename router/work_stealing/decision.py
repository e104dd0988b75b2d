"""Work stealing: decides which waiting calls go back to the router, because an idle engine would finish them sooner.

    a call moves if   cost on the idle engine  <  cost where it waits - margin

Both costs come from the model of policy `cost` (cost_model.py). The cost on the idle engine includes the tokens that it
must compute again. The cost where the call waits includes the calls before it in that queue. The policy then places a
stolen call like any other, and finds the idle engine. No clock and no I/O, so the simulator runs the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from rsm.broker.protocol.models import EngineState
from rsm.broker.protocol.rules import rank_of
from rsm.broker.protocol.snapshot import Ahead, EngineView, SessionView
from rsm.broker.protocol.waiting_calls import WaitingCall
from rsm.router.admission import Admission, context_of
from rsm.router.cost_model import CostModel, reusable
from rsm.router.views import CallView

# How many calls are considered in a round, in all and from one queue: a few milliseconds of a router's time.
_MAX_CALLS, _MAX_PER_QUEUE = 128, 64
# A move must save this many seconds, and this fraction of the call's remaining time, because the estimates are not
# exact, and a call that moves back and forth gains nothing.
_MARGIN_S, _MARGIN = 0.25, 0.25
# How often a call may move. In each new queue it keeps its place by arrival, so this only limits the cost of errors.
_MOST_MOVES = 3
# Ranks before and after all others.
_BEFORE, _AFTER = -1, 1 << 20
_NOWHERE = SessionView()


def is_idle(engine: EngineView) -> bool:
    """Whether a call that arrives now would start at once."""
    return engine.state == EngineState.READY and not engine.queued and engine.running < engine.max_num_seqs


def is_loaded(engine: EngineView) -> bool:
    """Whether calls wait that will not be claimed in a moment, because its slots are used or it is still starting."""
    if engine.state == EngineState.STARTING:
        return engine.queued > 0
    return engine.state == EngineState.READY and engine.queued > 0 and engine.running >= engine.max_num_seqs


def idle_and_loaded(engines: Iterable[EngineView]) -> tuple[list[EngineView], list[EngineView]]:
    """The idle and the loaded engines; both empty unless there are engines of both kinds."""
    engines = list(engines)
    idle, loaded = [e for e in engines if is_idle(e)], [e for e in engines if is_loaded(e)]
    return (idle, loaded) if idle and loaded else ([], [])


def head(loaded: int) -> int:
    """How many calls to consider from each queue, if this many engines are loaded."""
    return max(1, min(_MAX_PER_QUEUE, _MAX_CALLS // max(loaded, 1)))


@dataclass(slots=True)
class _IdleEngine:
    """An idle engine with the calls that it was given in this round. `kv_left`: free tokens of its KV cache."""

    view: EngineView
    kv_left: float = field(init=False)

    def __post_init__(self) -> None:
        free = self.view.kv_tokens * (1 - self.view.kv_usage)
        self.kv_left = free if self.view.kv_tokens else inf

    def can_take(self, call: CallView, context: int) -> bool:
        return call.model in ("", self.view.model) and is_idle(self.view) and context <= self.kv_left

    def take(self, tokens: int, context: int) -> None:
        """`tokens`: the prompt tokens that it will compute."""
        prefill_s = tokens * self.view.speed.token_s if self.view.speed else 0.0
        self.view = replace(self.view, running=self.view.running + 1, prefill_s=self.view.prefill_s + prefill_s)
        self.kv_left -= context


@dataclass(slots=True)
class _QueueHead:
    """A loaded queue up to the current call: the calls before it that stay, and the prompt tokens that they need."""

    view: EngineView
    size: int
    calls: int = 0
    tokens: int = 0

    def view_of_call(self) -> EngineView:
        """The engine as the current call finds it: calls before it run first, and it delays the calls after it."""
        ahead = {_BEFORE: Ahead(self.calls, self.tokens), _AFTER: Ahead(max(0, self.size - self.calls - 1), 0)}
        return replace(self.view, ahead=ahead)

    def keep(self, call: WaitingCall) -> None:
        self.calls += 1
        self.tokens += max(0, call.prompt_tokens - call.reuse)


class Stealing:
    """Decides for one router. `model`: the policy's own model, so that the policy agrees with the decision."""

    def __init__(self, model: CostModel, admission: Admission | None = None) -> None:
        self._model = model
        self._admission = admission

    def moves(
        self,
        idle: Sequence[EngineView],
        loaded: Sequence[EngineView],
        waiting: Sequence[WaitingCall],
        sessions: Mapping[str, SessionView],
    ) -> list[WaitingCall]:
        """The calls to take, at most as many as the idle engines have free slots.

        Args:
            waiting: the first calls of the loaded engines' queues, in the order of each queue.
            sessions: the sessions of these calls.
        """
        takers = [_IdleEngine(e) for e in idle]
        queues = {e.id: _QueueHead(e, e.queued) for e in loaded}
        moved = []
        for call in sorted(waiting, key=lambda c: rank_of(c.priority, c.level)):
            if not any(is_idle(t.view) for t in takers):
                break
            queue = queues.get(call.engine)
            if queue is None:
                continue
            if self._take(call, queue, takers, sessions.get(call.session, _NOWHERE)):
                queue.size -= 1
                moved.append(call)
            else:
                queue.keep(call)
        return moved

    def _take(self, call: WaitingCall, queue: _QueueHead, takers: Sequence[_IdleEngine], session: SessionView) -> bool:
        """Gives the call to the idle engine with the lowest cost, if that saves enough time."""
        view, session = _view(call), replace(session, bound="")
        able = [t for t in takers if self._may_take(call, view, t, session)]
        if not able:
            return False
        costs = self._model.estimate(view, [t.view for t in able], session)
        best = min(able, key=lambda t: (costs[t.view.id], t.view.served, t.view.id))
        if not _saves_enough(costs[best.view.id], self._cost_of_staying(call, view, queue, session)):
            return False
        best.take(call.prompt_tokens - reusable(view, best.view, session), context_of(view, best.view, session))
        return True

    def _may_take(self, call: WaitingCall, view: CallView, taker: _IdleEngine, session: SessionView) -> bool:
        if call.moves >= _MOST_MOVES or not taker.can_take(view, context_of(view, taker.view, session)):
            return False
        return self._admission is None or bool(self._admission.open_to(view, [taker.view], session))

    def _cost_of_staying(self, call: WaitingCall, view: CallView, queue: _QueueHead, session: SessionView) -> float:
        """Infinite on an engine that is still starting, which may take minutes and will have an empty cache."""
        if queue.view.state != EngineState.READY:
            return inf
        if call.engine not in session.resident and call.reuse:
            session = replace(session, resident={**session.resident, call.engine: call.reuse})
        return self._model.estimate(view, [queue.view_of_call()], session)[call.engine]


def _saves_enough(move: float, stay: float) -> bool:
    return move + _MARGIN_S < stay and move < stay * (1 - _MARGIN)


def _view(call: WaitingCall) -> CallView:
    return CallView(call.session, call.model, call.prompt_tokens, priority=call.priority)
