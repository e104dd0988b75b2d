"""What clients heard of their streams, held against what an undisturbed engine says. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class Heard:
    """One stream at its client. Times in seconds on one clock.

    Attributes:
        words: what came, a word a token, each with the time of the chunk that it came in.
        ended: the stream came to its proper end, by its own account.
        error: what else the client was told.
    """

    words: list[tuple[str, float]] = field(default_factory=list)
    ended: bool = False
    error: str = ""

    def take(self, text: str, at: float) -> None:
        self.words += [(word, at) for word in text.split()]

    def longest_gap_s(self, since: float) -> float:
        """The longest time without a word that reaches beyond `since`, up to the last word; 0 if none does."""
        times = [at for _, at in self.words]
        return max((b - a for a, b in pairwise(times) if b > since), default=0.0)


@dataclass(frozen=True, slots=True)
class Account:
    """One stream's balance. `lost` and `repeated` count tokens; `in_order`: what came is the beginning of the text."""

    cut: bool
    lost: int
    repeated: int
    in_order: bool

    @classmethod
    def of(cls, expected: str, heard: Heard) -> Account:
        wanted, got = expected.split(), [word for word, _ in heard.words]
        lost, repeated = Counter(wanted) - Counter(got), Counter(got) - Counter(wanted)
        return cls(not heard.ended, lost.total(), repeated.total(), got == wanted[: len(got)])


@dataclass(frozen=True, slots=True)
class Total:
    """All streams of one run. `on_killed`: how many ran on the engine that was killed."""

    streams: int
    on_killed: int
    cut: int
    lost: int
    repeated: int
    disordered: int
    longest_gap_s: float

    @classmethod
    def of(cls, accounts: Sequence[Account], on_killed: int, gap_s: float) -> Total:
        return cls(
            len(accounts),
            on_killed,
            sum(a.cut for a in accounts),
            sum(a.lost for a in accounts),
            sum(a.repeated for a in accounts),
            sum(not a.in_order for a in accounts),
            gap_s,
        )

    @classmethod
    def sum(cls, runs: Sequence[Total]) -> Total:
        """Several runs of one system; the gap is the longest of all."""
        return cls(
            sum(r.streams for r in runs),
            sum(r.on_killed for r in runs),
            sum(r.cut for r in runs),
            sum(r.lost for r in runs),
            sum(r.repeated for r in runs),
            sum(r.disordered for r in runs),
            max(r.longest_gap_s for r in runs),
        )
