"""Compares what clients received of their streams with the text of an undisturbed engine. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class Received:
    """One stream at its client. Times in seconds on one clock.

    Attributes:
        words: the received words, one per token, each with the time of its chunk.
        ended: whether the stream reported a normal end.
        error: the error that the client saw instead.
    """

    words: list[tuple[str, float]] = field(default_factory=list)
    ended: bool = False
    error: str = ""

    def take(self, text: str, at: float) -> None:
        self.words += [(word, at) for word in text.split()]

    def longest_gap_s(self, since: float) -> float:
        """Returns the longest gap between two words that ends after `since`; 0 if there is none."""
        times = [at for _, at in self.words]
        return max((b - a for a, b in pairwise(times) if b > since), default=0.0)


@dataclass(frozen=True, slots=True)
class Account:
    """The account of one stream. `lost` and `repeated` count tokens; `in_order`: the words are a prefix of the text."""

    cut: bool
    lost: int
    repeated: int
    in_order: bool

    @classmethod
    def of(cls, expected: str, received: Received) -> Account:
        wanted, got = expected.split(), [word for word, _ in received.words]
        lost, repeated = Counter(wanted) - Counter(got), Counter(got) - Counter(wanted)
        return cls(not received.ended, lost.total(), repeated.total(), got == wanted[: len(got)])


@dataclass(frozen=True, slots=True)
class Total:
    """All streams of one run. `on_killed`: number of streams on the killed engine."""

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
        """Adds up several runs of one system; keeps the longest gap."""
        return cls(
            sum(r.streams for r in runs),
            sum(r.on_killed for r in runs),
            sum(r.cut for r in runs),
            sum(r.lost for r in runs),
            sum(r.repeated for r in runs),
            sum(r.disordered for r in runs),
            max(r.longest_gap_s for r in runs),
        )
