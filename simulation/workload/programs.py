"""Programs of a workload: their calls, the dependencies of each, and the tokens that prompts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Segment(NamedTuple):
    """The first `tokens` tokens of text number `text`. Equal numbers are equal texts, in any program."""

    text: int
    tokens: int


@dataclass(frozen=True, slots=True)
class CallSpec:
    """One LLM call.

    Attributes:
        prompt: its segments, in order.
        output_tokens: the length of the answer, which only the engine knows.
        answer: the text number of the answer, for later prompts that contain it; 0 = none does.
        after: the indices of the calls in this program that must have ended before. Default: none, so the call arrives
            with the program.
        delay_s: tool or human time between the last of those ends (or the program's arrival) and this call.
        child: the name of the sub-agent, a child session, that makes this call; "" = the program itself.
    """

    prompt: tuple[Segment, ...]
    output_tokens: int
    answer: int = 0
    after: tuple[int, ...] = ()
    delay_s: float = 0.0
    child: str = ""

    @property
    def prompt_tokens(self) -> int:
        return sum(s.tokens for s in self.prompt)


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """A whole program. `kind` names its workload: chat, react, tree, coding, prefix, …"""

    id: str
    kind: str
    arrival_s: float
    calls: tuple[CallSpec, ...]

    @property
    def output_tokens(self) -> int:
        return sum(c.output_tokens for c in self.calls)


Workload = Sequence[ProgramSpec]
