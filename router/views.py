"""What a routing policy is given and gives: calls, engines and sessions as a router sees them, and a choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rsm.broker.protocol.snapshot import EngineView, SessionView

__all__ = ["CallView", "Choice", "EngineView", "SessionView"]


@dataclass(frozen=True, slots=True)
class CallView:
    """What a policy knows of a call.

    Attributes:
        prompt_tokens: the producer's count or an estimate.
        program: the root session, to which its service is charged; "" = its own session.
        priority: the user's class, ahead of the level.
        level: as it waits, if it was held until now; none = that of its program.
    """

    session: str
    model: str
    prompt_tokens: int
    program: str = ""
    priority: int = 0
    level: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine, and why: one clause for `rsm call`.

    Attributes:
        bind: ties the session to this engine for its later calls.
        hit: whether the session's cache was found on it; None if that was not asked.
        reuse: prompt tokens that the engine should find in its cache.
        costs: what the call would take on each engine, in seconds; empty if the policy does not reckon so.
        throttle: no engine now; the call waits in the router (`engine` says whose room it waits for).
    """

    engine: str
    why: str
    bind: bool = False
    hit: bool | None = None
    reuse: int = 0
    costs: Mapping[str, float] = field(default_factory=dict)
    throttle: bool = False
