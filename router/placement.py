"""The router's decisions, without Redis: from a view of the fleet and the sessions, decides on a batch of calls.

No clock and no I/O, so the simulator runs the same code in virtual time.
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

NO_ENGINE = "No engine serves the model {model!r}. Available models: {models}."
PARKED = "no engine of its model is ready yet"
_NOWHERE = SessionView()


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with one call: assign it to an engine, park it, throttle it, or refuse it.

    Attributes:
        choice: the engine; None = no engine of its model takes calls, so it is parked or refused.
        seen: the engine that its session was bound to at the time of the decision.
        refusal: why no engine can run it; "" = it is not refused.
        context: tokens of KV that it will hold; 0 without admission.
        new: the part of `context` that no other call of its session holds there.
    """

    choice: Choice | None
    seen: str = ""
    refusal: str = ""
    context: int = 0
    new: int = 0


class Chooser:
    """Places calls with a policy, and adds its own placements to its view of the fleet.

    Not thread-safe. Between two snapshots of the fleet (`see`), calls that it placed count as queued.
    """

    def __init__(self, policy: Policy, admission: Admission | None = None) -> None:
        self.policy = policy
        self.admission = admission
        self._fleet: dict[str, EngineView] = {}
        self._models: frozenset[str] = frozenset()
        # The engines that take calls, by model ("" = any) and id; built on first use.
        self._ready: dict[str, dict[str, EngineView]] = {}

    @property
    def fleet(self) -> Mapping[str, EngineView]:
        """All engines by id, in any state, including the calls that were placed since `see`."""
        return self._fleet

    @property
    def models(self) -> frozenset[str]:
        """All models that the fleet serves, or will serve when its engines have started."""
        return self._models

    def see(self, engines: Iterable[EngineView]) -> None:
        """Takes a new snapshot of the whole fleet."""
        self._fleet = {e.id: e for e in engines}
        self._models = frozenset(e.model for e in self._fleet.values())
        self._ready.clear()

    def update(self, engine: EngineView) -> None:
        """Takes a new view of one engine. Cheaper than `see` if neither its state nor its model has changed."""
        old = self._fleet.get(engine.id)
        if old is None or (old.state, old.model) != (engine.state, engine.model):
            self.see([*(e for e in self._fleet.values() if e.id != engine.id), engine])
        else:
            self._put(engine)

    def needs_session(self, call: CallView) -> bool:
        """Whether `place` needs the call's session."""
        return self.admission is not None or self.policy.needs_session(call)

    def ready(self, model: str) -> Sequence[EngineView]:
        """The engines that take calls of a model; "" = of any model."""
        found = self._ready.get(model)
        if found is None:
            found = {e.id: e for e in self._fleet.values() if e.state == EngineState.READY and model in ("", e.model)}
            self._ready[model] = found
        return list(found.values())

    def place(self, calls: Sequence[CallView], sessions: Mapping[str, SessionView], now: float) -> list[Decision]:
        """Decides on a batch, in order.

        Args:
            sessions: the sessions of the calls for which `needs_session` is true.
            now: seconds, on any monotonic clock.
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
        return self._assign(call, choice, session, sessions)

    def _choice(self, call: CallView, ready: Sequence[EngineView], session: SessionView) -> Choice:
        if self.admission is not None:
            ready = self.admission.open_to(call, ready, session)
        if not ready:
            return Choice("", THROTTLED.format(tokens=call.prompt_tokens), throttle=True)
        return self.policy.choose(call, ready, session)

    def _assign(
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
        """An empty fleet refuses no call, because engines may still start."""
        if not self._fleet or not model or model in self._models:
            return ""
        return NO_ENGINE.format(model=model, models=", ".join(sorted(self._models)))

    def _put(self, engine: EngineView) -> None:
        self._fleet[engine.id] = engine
        for model in ("", engine.model):
            ready = self._ready.get(model)
            if ready and engine.id in ready:
                ready[engine.id] = engine
