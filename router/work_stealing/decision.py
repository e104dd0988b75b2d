"""Work stealing: which waiting calls go back to the router, because an idle engine would have them done sooner.

    it pays where   cost on the idle engine  <  cost where it waits, less a margin

Both costs are those of policy `cost` (costs.py): on the idle engine with the tokens that it must compute anew there,
where the call waits with what stands before it in that queue. No clock and no I/O, so a simulation drives the very same
code. What was taken goes the ordinary way from there: the policy places it, now that an engine is idle.
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

# How many calls are looked at in a round, in all and of one queue: some milliseconds of a router's time.
_LOOKED_AT, _HEAD = 128, 64
# A move must save so many seconds, and such a share of what the call would still take: what is reckoned is not exact,
# and a call that moves to and fro gains nothing.
_MARGIN_S, _MARGIN = 0.25, 0.25
# How often a call may move. Each time it stands in another queue by its arrival, so this only bounds what errors cost.
_MOST_MOVES = 3
# Ranks before and behind all that there are.
_BEFORE, _BEHIND = -1, 1 << 20
_NOWHERE = SessionView()


def is_idle(engine: EngineView) -> bool:
    """A call that came now would start at once."""
    return engine.state == EngineState.READY and not engine.queued and engine.running < engine.max_num_seqs


def is_loaded(engine: EngineView) -> bool:
    """Calls wait for it, and will not be claimed in a moment: its slots are taken, or it is only coming up."""
    if engine.state == EngineState.STARTING:
        return engine.queued > 0
    return engine.state == EngineState.READY and engine.queued > 0 and engine.running >= engine.max_num_seqs


def idle_and_loaded(engines: Iterable[EngineView]) -> tuple[list[EngineView], list[EngineView]]:
    """Who could take calls, and from whom; both empty if there is nothing to take or nobody to take it."""
    engines = list(engines)
    idle, loaded = [e for e in engines if is_idle(e)], [e for e in engines if is_loaded(e)]
    return (idle, loaded) if idle and loaded else ([], [])


def head(loaded: int) -> int:
    """How many calls to look at of each queue, of so many loaded engines."""
    return max(1, min(_HEAD, _LOOKED_AT // max(loaded, 1)))


@dataclass(slots=True)
class _Taker:
    """An idle engine with what it has been given in this round. `room`: tokens that its KV cache has left."""

    view: EngineView
    room: float = field(init=False)

    def __post_init__(self) -> None:
        free = self.view.kv_tokens * (1 - self.view.kv_usage)
        self.room = free if self.view.kv_tokens else inf

    def can_take(self, call: CallView, context: int) -> bool:
        return call.model in ("", self.view.model) and is_idle(self.view) and context <= self.room

    def take(self, tokens: int, context: int) -> None:
        """tokens: of the prompt, that it will compute."""
        prefill_s = tokens * self.view.speed.token_s if self.view.speed else 0.0
        self.view = replace(self.view, running=self.view.running + 1, prefill_s=self.view.prefill_s + prefill_s)
        self.room -= context


@dataclass(slots=True)
class _QueueHead:
    """A loaded queue up to the call in hand: calls before it that stay, and the prompt tokens that they need."""

    view: EngineView
    size: int
    calls: int = 0
    tokens: int = 0

    def before(self) -> EngineView:
        """The engine as the call in hand finds it: those before it go first, those behind it are delayed by it."""
        ahead = {_BEFORE: Ahead(self.calls, self.tokens), _BEHIND: Ahead(max(0, self.size - self.calls - 1), 0)}
        return replace(self.view, ahead=ahead)

    def stays(self, call: WaitingCall) -> None:
        self.calls += 1
        self.tokens += max(0, call.prompt_tokens - call.reuse)


class Stealing:
    """Decides for one router. `model`: the policy's own, so that it sees in a move what was seen in it here."""

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
            waiting: of the loaded engines, each queue from its head on, in its order.
            sessions: those of the calls.
        """
        takers = [_Taker(e) for e in idle]
        lines = {e.id: _QueueHead(e, e.queued) for e in loaded}
        moved = []
        for call in sorted(waiting, key=lambda c: rank_of(c.priority, c.level)):
            if not any(is_idle(t.view) for t in takers):
                break
            line = lines.get(call.engine)
            if line is None:
                continue
            if self._take(call, line, takers, sessions.get(call.session, _NOWHERE)):
                line.size -= 1
                moved.append(call)
            else:
                line.stays(call)
        return moved

    def _take(self, call: WaitingCall, line: _QueueHead, takers: Sequence[_Taker], session: SessionView) -> bool:
        """Gives the call to the engine where it costs least, if that pays."""
        view, session = _view(call), replace(session, bound="")
        able = [t for t in takers if self._may_take(call, view, t, session)]
        if not able:
            return False
        costs = self._model.reckon(view, [t.view for t in able], session)
        best = min(able, key=lambda t: (costs[t.view.id], t.view.served, t.view.id))
        if not _pays(costs[best.view.id], self._cost_of_staying(call, view, line, session)):
            return False
        best.take(call.prompt_tokens - reusable(view, best.view, session), context_of(view, best.view, session))
        return True

    def _may_take(self, call: WaitingCall, view: CallView, taker: _Taker, session: SessionView) -> bool:
        if call.moves >= _MOST_MOVES or not taker.can_take(view, context_of(view, taker.view, session)):
            return False
        return self._admission is None or bool(self._admission.open_to(view, [taker.view], session))

    def _cost_of_staying(self, call: WaitingCall, view: CallView, line: _QueueHead, session: SessionView) -> float:
        """An engine that is only coming up may take minutes, and has an empty cache."""
        if line.view.state != EngineState.READY:
            return inf
        if call.engine not in session.resident and call.reuse:
            session = replace(session, resident={**session.resident, call.engine: call.reuse})
        return self._model.reckon(view, [line.before()], session)[call.engine]


def _pays(move: float, stay: float) -> bool:
    return move + _MARGIN_S < stay and move < stay * (1 - _MARGIN)


def _view(call: WaitingCall) -> CallView:
    return CallView(call.session, call.model, call.prompt_tokens, priority=call.priority)
