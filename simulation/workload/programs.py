"""What programs look like: calls, what each waits for, and which tokens its prompt shares with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Segment(NamedTuple):
    """The first `tokens` tokens of the text number `text`; equal numbers are equal texts, in any program."""

    text: int
    tokens: int


@dataclass(frozen=True, slots=True)
class CallSpec:
    """One LLM call.

    Attributes:
        prompt: the segments that make it up, in order.
        output_tokens: how long the answer will be; nobody but the engine knows.
        answer: number of the answer's text, for later prompts that hold it; 0 = none does.
        after: the calls of this program, by index, that must have ended before; none = it comes with the program.
        delay_s: tool or human time between the last of those ends (or the program's arrival) and this call.
        child: this call is made by a sub-agent of that name, a child session; "" = by the program itself.
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
    """A program as it will unfold. `kind` names its workload: chat, react, tree, coding, prefix, …"""

    id: str
    kind: str
    arrival_s: float
    calls: tuple[CallSpec, ...]

    @property
    def output_tokens(self) -> int:
        return sum(c.output_tokens for c in self.calls)


Workload = Sequence[ProgramSpec]
