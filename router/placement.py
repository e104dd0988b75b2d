"""The router's choice without Redis: the fleet and the sessions as they were seen, and a batch of calls, to placements.

No clock and no I/O, so a simulation drives the very same code in virtual time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rsm.broker.protocol.models import EngineState
from rsm.broker.protocol.rules import rank_of
from rsm.broker.protocol.snapshot import EngineView, SessionView
from rsm.router.admission import THROTTLED, Admission, context_of, new_of, with_context
from rsm.router.policies.base import Policy, with_call
from rsm.router.views import CallView, Choice

NO_ENGINE = "No engine serves the model {model!r}. Models at hand: {models}."
PARKED = "no engine of its model takes calls yet"
_NOWHERE = SessionView()


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to become of one call: an engine (`choice`), a place among the parked, or a refusal.

    Attributes:
        choice: None = no engine of its model takes calls: it is parked, or refused.
        seen: the engine that its session was bound to when this was decided.
        refusal: why no engine will ever run it; "" = it is not refused.
        context: tokens of KV that it will hold; 0 = nobody asks.
        new: what of them no other call of its session holds there.
    """

    choice: Choice | None
    seen: str = ""
    refusal: str = ""
    context: int = 0
    new: int = 0


class Chooser:
    """Places calls by a policy, and keeps the view of the fleet up to date with what it has placed itself.

    Not for several threads. Between two snapshots of the fleet (`see`), calls that it placed count as queued.
    """

    def __init__(self, policy: Policy, admission: Admission | None = None) -> None:
        self.policy = policy
        self.admission = admission
        self._fleet: dict[str, EngineView] = {}
        self._models: frozenset[str] = frozenset()
        # By model ("" = any) and id, those that take calls; made when first asked for.
        self._ready: dict[str, dict[str, EngineView]] = {}

    @property
    def fleet(self) -> Mapping[str, EngineView]:
        """The engines by id, whatever their state, with the calls that were placed since `see`."""
        return self._fleet

    @property
    def models(self) -> frozenset[str]:
        """All models that the fleet serves, or will when its engines are up."""
        return self._models

    def see(self, engines: Iterable[EngineView]) -> None:
        """The whole fleet as it is now."""
        self._fleet = {e.id: e for e in engines}
        self._models = frozenset(e.model for e in self._fleet.values())
        self._ready.clear()

    def update(self, engine: EngineView) -> None:
        """One engine as it is now. Cheaper than `see` while neither its state nor its model changes."""
        old = self._fleet.get(engine.id)
        if old is None or (old.state, old.model) != (engine.state, engine.model):
            self.see([*(e for e in self._fleet.values() if e.id != engine.id), engine])
        else:
            self._put(engine)

    def needs_session(self, call: CallView) -> bool:
        """Whether `place` wants to know the call's session."""
        return self.admission is not None or self.policy.needs_session(call)

    def ready(self, model: str) -> Sequence[EngineView]:
        """The engines that take calls of a model; "" = of any."""
        found = self._ready.get(model)
        if found is None:
            found = {e.id: e for e in self._fleet.values() if e.state == EngineState.READY and model in ("", e.model)}
            self._ready[model] = found
        return list(found.values())

    def place(self, calls: Sequence[CallView], sessions: Mapping[str, SessionView], now: float) -> list[Decision]:
        """Decides on a batch, in order.

        Args:
            sessions: those of the calls for which `needs_session` is true.
            now: seconds, on any clock that only goes forward.
        """
        self.policy.now = now
        known = dict(sessions)
        return [self._place(call, known) for call in calls]

    def _place(self, call: CallView, sessions: dict[str, SessionView]) -> Decision:
        ready = self.ready(call.model)
        if not ready:
            return Decision(None, refusal=self._refusal(call.model))
        session = sessions.get(call.session, _NOWHERE)
        if call.level is not None:
            session = replace(session, level=call.level)
        choice = self._choice(call, ready, session)
        if choice.throttle:
            return Decision(choice, session.bound, context=context_of(call, ready[0], session))
        return self._given(call, choice, session, sessions)

    def _choice(self, call: CallView, ready: Sequence[EngineView], session: SessionView) -> Choice:
        if self.admission is not None:
            ready = self.admission.open_to(call, ready, session)
        if not ready:
            return Choice("", THROTTLED.format(tokens=call.prompt_tokens), throttle=True)
        return self.policy.choose(call, ready, session)

    def _given(
        self, call: CallView, choice: Choice, session: SessionView, sessions: dict[str, SessionView]
    ) -> Decision:
        engine, seen, context, new = self._fleet[choice.engine], session.bound, 0, 0
        if choice.bind:
            session = sessions[call.session] = replace(session, bound=choice.engine)
        if self.admission is not None:
            context, new = context_of(call, engine, session), new_of(call, engine, session)
            engine, sessions[call.session] = with_context(engine, call, session)
        rank = rank_of(call.priority, session.level) if choice.costs else None
        self._put(with_call(engine, call.prompt_tokens, reuse=choice.reuse, rank=rank))
        return Decision(choice, seen, context=context, new=new)

    def _refusal(self, model: str) -> str:
        """An empty fleet refuses nobody: engines may be on their way."""
        if not self._fleet or not model or model in self._models:
            return ""
        return NO_ENGINE.format(model=model, models=", ".join(sorted(self._models)))

    def _put(self, engine: EngineView) -> None:
        self._fleet[engine.id] = engine
        for model in ("", engine.model):
            ready = self._ready.get(model)
            if ready and engine.id in ready:
                ready[engine.id] = engine
