"""The interface of a routing policy: one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from rsm.broker.protocol.snapshot import Ahead, EngineView, SessionView
from rsm.broker.settings import Settings
from rsm.router.cost_model import CostModel
from rsm.router.views import CallView, Choice


class Policy(ABC):
    """Chooses engines. One object lives in each router; state that routers must share belongs in Redis.

    `needs_session(call)` says whether `choose` will look at the session's affinity, so that a router can spare
    itself the read. `now`: the time of the batch in hand in seconds, on whatever clock drives this policy.
    """

    now: float = 0.0

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def needs_session(self, call: CallView) -> bool:
        return False

    def cost_model(self) -> CostModel | None:
        """By what it reckons calls' costs, if it does: then idle engines take waiting calls where that pays."""
        return None

    @abstractmethod
    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        """The engine for a call.

        Args:
            engines: those that take calls of its model, at least one; loads include the calls of this batch so far.
            session: where its program's cache is; empty unless `needs_session`.
        """


def least_loaded(engines: Sequence[EngineView]) -> EngineView:
    """The engine with the fewest prompt tokens waiting or running; ties go to the one that has served least.

    Tokens are counted at dispatch, not calls at first byte: a call is load from the moment it is assigned.
    """
    return min(engines, key=lambda e: (e.load_tokens, e.running + e.queued, e.served, e.id))


def with_call(engine: EngineView, prompt_tokens: int, *, reuse: int = 0, rank: int | None = None) -> EngineView:
    """The engine as it is once a call has been given to it. `rank`: its place in the queue, if that is reckoned."""
    ahead = engine.ahead
    if rank is not None:
        calls, tokens = ahead.get(rank, (0, 0))
        ahead = {**ahead, rank: Ahead(calls + 1, tokens + max(prompt_tokens - reuse, 0))}
    return replace(
        engine,
        queued=engine.queued + 1,
        queued_tokens=engine.queued_tokens + prompt_tokens,
        served=engine.served + 1,
        ahead=ahead,
    )
