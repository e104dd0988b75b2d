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
    """Chooses engines. Each router has one object; state that routers must share belongs in Redis.

    Attributes:
        now: the time of the current batch in seconds, on the clock that drives this policy.
    """

    now: float = 0.0

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def needs_session(self, call: CallView) -> bool:
        """Whether `choose` uses the session's affinity. If not, the router does not read it."""
        return False

    def cost_model(self) -> CostModel | None:
        """The policy's cost model, if it has one. With one, idle engines take waiting calls if that saves time."""
        return None

    @abstractmethod
    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        """Chooses the engine for a call.

        Args:
            engines: the engines that take calls of its model, at least one. Their loads include the calls of this batch
                so far.
            session: where the session's cache is; empty unless `needs_session`.
        """


def least_loaded(engines: Sequence[EngineView]) -> EngineView:
    """The engine with the fewest waiting and running prompt tokens. Ties go to the engine that has served fewest calls.

    A call's tokens count as load from the moment it is assigned.
    """
    return min(engines, key=lambda e: (e.load_tokens, e.running + e.queued, e.served, e.id))


def with_call(engine: EngineView, prompt_tokens: int, *, reuse: int = 0, rank: int | None = None) -> EngineView:
    """The engine after a call has been assigned to it. `rank`: the call's rank, to count it in `ahead`."""
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
