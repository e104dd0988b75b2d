"""What a simulated run gave: calls, programs and engines, in seconds of virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rsm.simulation.workload.programs import ProgramSpec


@dataclass(slots=True)
class CallTimes:
    """One call as it went. A time of None: it did not come to that before the horizon.

    Attributes:
        index: its number in its program.
        ready_s: when its producer pushed it. assigned_s: the router chose `engine`. claimed_s: the worker took it.
        started_s: it first had a place in the engine's batch. first_token_s, ended_s: in the engine.
        told_s: its producer heard of the end.
        level: the scheduling level that it was queued with. why: the policy's words.
        error: why it could not run; "" = it could.
        moves: how often it was taken from one engine's queue for another, idle one.
    """

    program: str
    index: int
    session: str
    prompt_tokens: int
    output_tokens: int
    ready_s: float
    assigned_s: float | None = None
    claimed_s: float | None = None
    started_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    told_s: float | None = None
    engine: str = ""
    level: int = 0
    why: str = ""
    cached_tokens: int = 0
    preemptions: int = 0
    error: str = ""
    moves: int = 0


@dataclass(slots=True)
class ProgramTimes:
    """One program as it went. `ended_s` None: it was not finished at the horizon, or failed.

    Attributes:
        calls: those that became ready, in the order in which they did.
        delay_s: tool and human time on the path that its end waited for, so far.
    """

    spec: ProgramSpec
    calls: list[CallTimes] = field(default_factory=list)
    ended_s: float | None = None
    delay_s: float = 0.0
    error: str = ""

    @property
    def response_s(self) -> float | None:
        """From its arrival until its last call's end is known."""
        return None if self.ended_s is None else self.ended_s - self.spec.arrival_s


@dataclass(slots=True)
class EngineTimes:
    """What one engine did.

    Attributes:
        busy_s: time in steps. steps: how many.
        prompt_tokens, cached_tokens, output_tokens: of calls that ended on it.
    """

    id: str
    busy_s: float = 0.0
    steps: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Results:
    """A whole run. `until_s`: when it ended: the last event, or the horizon. `wall_s`: real seconds that it took."""

    programs: Sequence[ProgramTimes]
    engines: Sequence[EngineTimes]
    until_s: float
    wall_s: float
    events: int

    @property
    def calls(self) -> list[CallTimes]:
        return [call for program in self.programs for call in program.calls]

    @property
    def unfinished(self) -> list[ProgramTimes]:
        """Programs that had come and were not done at the end, failed ones included."""
        return [p for p in self.programs if p.ended_s is None]

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were cached, of calls that ended."""
        prompt = sum(e.prompt_tokens for e in self.engines)
        return sum(e.cached_tokens for e in self.engines) / prompt if prompt else 0.0
