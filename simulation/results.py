"""The results of a simulated run: calls, programs and engines, in seconds of virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rsm.simulation.workload.programs import ProgramSpec


@dataclass(slots=True)
class CallTimes:
    """The times of one call. A time of None was not reached before the horizon.

    Attributes:
        index: its number in its program.
        ready_s: when its producer pushed it. assigned_s: the router chose `engine`. claimed_s: the worker claimed it.
        started_s: it first got a slot in the engine's batch. first_token_s, ended_s: in the engine.
        reported_s: when its end was reported to the producer.
        level: its scheduling level in the queue. why: the policy's reason.
        error: why it could not run; "" = it could.
        moves: how often it was moved from one engine's queue to an idle engine.
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
    reported_s: float | None = None
    engine: str = ""
    level: int = 0
    why: str = ""
    cached_tokens: int = 0
    preemptions: int = 0
    error: str = ""
    moves: int = 0


@dataclass(slots=True)
class ProgramTimes:
    """The times of one program. `ended_s` is None if it had not finished at the horizon, or failed.

    Attributes:
        calls: the calls that became ready, in that order.
        delay_s: tool and human time on the critical path so far.
    """

    spec: ProgramSpec
    calls: list[CallTimes] = field(default_factory=list)
    ended_s: float | None = None
    delay_s: float = 0.0
    error: str = ""

    @property
    def response_s(self) -> float | None:
        """The time from its arrival until its last call's end is reported."""
        return None if self.ended_s is None else self.ended_s - self.spec.arrival_s


@dataclass(slots=True)
class EngineTimes:
    """The work of one engine.

    Attributes:
        busy_s: time in steps. steps: the number of steps.
        prompt_tokens, cached_tokens, output_tokens: totals of the calls that ended on it.
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
    """A whole run. `until_s`: its end, which is the last event or the horizon. `wall_s`: the real seconds it took."""

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
        """Programs that had arrived and were not done at the end, including failed ones."""
        return [p for p in self.programs if p.ended_s is None]

    @property
    def hit_rate(self) -> float:
        """The share of cached prompt tokens, over the calls that ended."""
        prompt = sum(e.prompt_tokens for e in self.engines)
        return sum(e.cached_tokens for e in self.engines) / prompt if prompt else 0.0
