"""The inputs and the output of a routing policy: views of calls, engines and sessions, and a choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rsm.broker.protocol.snapshot import EngineView, SessionView

__all__ = ["CallView", "Choice", "EngineView", "SessionView"]


@dataclass(frozen=True, slots=True)
class CallView:
    """What a policy knows about a call.

    Attributes:
        prompt_tokens: the producer's count or an estimate.
        program: the root session, which is charged for its service; "" = its own session.
        priority: the user's class, which precedes the level.
        level: the level at which it was throttled. Default: that of its program.
    """

    session: str
    model: str
    prompt_tokens: int
    program: str = ""
    priority: int = 0
    level: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine, and the reason for it, as one clause that `rsm call` shows.

    Attributes:
        bind: bind the session to this engine for its later calls.
        hit: whether the session's cache is on this engine; None if the policy did not check.
        reuse: prompt tokens that the engine should find in its cache.
        costs: the time that the call would take on each engine, in seconds; empty if the policy does not estimate it.
        throttle: no engine now; the call waits in the router, and `engine` is empty.
    """

    engine: str
    why: str
    bind: bool = False
    hit: bool | None = None
    reuse: int = 0
    costs: Mapping[str, float] = field(default_factory=dict)
    throttle: bool = False
