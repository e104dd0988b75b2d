"""A call and a step of the modelled engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import ceil, sqrt
from typing import Any

from rsm.workers.backends.sim.cache import Hold, Path, path_of_ids, path_of_texts

Order = tuple[int, int, float, int]  # class, level, arrival, number; the smallest is first


class Phase(Enum):
    """The phase of a call in the engine."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(slots=True)
class Ticks:
    """Counts the engine's decoding steps; each gives every decoding call one token."""

    now: int = 0


class SimCall:
    """A call in the model. The length of its output is known from the start; `produced` counts the tokens so far.

    Attributes:
        cached: prompt tokens found in the prefix cache at its first start, -1 before.
        started_s, first_s: when it first got a slot and its first token, on the model's clock; -1 before.
    """

    __slots__ = (
        "_clock",
        "_computed",
        "_produced",
        "_since",
        "cached",
        "first_s",
        "held",
        "inherited",
        "key",
        "level",
        "order",
        "output_tokens",
        "path",
        "phase",
        "preemptions",
        "priority",
        "private",
        "program",
        "prompt_tokens",
        "ran_s",
        "started_s",
        "turn",
        "waited_s",
    )

    def __init__(
        self,
        key: str,
        prompt_tokens: int,
        output_tokens: int,
        path: Path = (),
        *,
        priority: int = 0,
        level: int = 0,
        program: str = "",
        inherited: float = 0.0,
        waited_s: float = 0.0,
        ran_s: float = 0.0,
    ) -> None:
        if prompt_tokens < 1 or output_tokens < 1:
            raise ValueError("A modelled call needs at least one prompt token and one output token.")
        self.key = key
        self.priority = priority
        self.level = level
        self.program = program
        self.inherited = inherited
        self.waited_s = waited_s
        self.ran_s = ran_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.path = path
        self.cached = -1
        self.preemptions = 0
        self.started_s = self.first_s = -1.0
        self.phase = Phase.WAITING
        self.order: Order = (priority, level, 0.0, 0)
        self.turn = 0  # the number of its last start, among all starts in the engine
        self.held: Hold | None = None  # blocks that others may share
        self.private = 0  # further blocks, while it is prefilled
        self._computed = 0  # tokens whose KV is in the cache, at the engine's tick `_since`
        self._produced = 0
        self._since = 0
        self._clock: Ticks | None = None  # the engine's, while the call decodes

    @classmethod
    def of_ids(cls, key: str, prompt: Sequence[int], output: Sequence[int], block_size: int, **more: Any) -> SimCall:
        """A call from token ids. `more`: further arguments of the constructor."""
        return cls(key, len(prompt), len(output), path_of_ids([*prompt, *output], block_size), **more)

    @classmethod
    def of_texts(
        cls, key: str, texts: Sequence[tuple[int, int]], output: tuple[int, int], block_size: int, **more: Any
    ) -> SimCall:
        """A call from texts as (number, tokens): the first tokens of the text with that number."""
        prompt_tokens = sum(tokens for _, tokens in texts)
        return cls(key, prompt_tokens, output[1], path_of_texts([*texts, output], block_size), **more)

    def __repr__(self) -> str:
        return f"SimCall({self.key}, {self.phase.value}, {self.produced} of {self.output_tokens} tokens)"

    @property
    def computed(self) -> int:
        """Tokens whose KV is in the cache."""
        return self._computed if self._clock is None else self._computed + self._clock.now - self._since

    @property
    def produced(self) -> int:
        """Output tokens so far."""
        return self._produced if self._clock is None else self._produced + self._clock.now - self._since

    @property
    def known(self) -> int:
        """Tokens so far: prompt and output."""
        return self.prompt_tokens + self.produced

    @property
    def finished(self) -> bool:
        return self.produced >= self.output_tokens

    @property
    def last_tick(self) -> int:
        """The engine's tick at which it gets its last token, while it decodes."""
        return self._since + self.output_tokens - self._produced

    def join(self, clock: Ticks) -> None:
        """Begins to decode: from now on each tick computes and produces one token."""
        self._clock, self._since, self.phase = clock, clock.now, Phase.DECODE

    def leave(self, phase: Phase) -> None:
        """Stops decoding."""
        self._computed, self._produced, self._clock, self.phase = self.computed, self.produced, None, phase


@dataclass(slots=True)
class Step:
    """One step of the engine, or `ticks` steps in which calls only decode. Times in seconds.

    Attributes:
        work: prompt tokens to compute, by call.
        prefill_pairs: pairs of a prompt token and an earlier one of the same call.
        decode_seqs, context_tokens: those of the first step.
    """

    starts_at: float
    ends_at: float = 0.0
    ticks: int = 1
    work: dict[SimCall, int] = field(default_factory=dict)
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_seqs: int = 0
    context_tokens: int = 0
    first_s: float = 0.0  # the cost of the first step
    growth_s: float = 0.0  # the cost of each step beyond that of the step before

    def end_of(self, ticks: int) -> float:
        """When `ticks` of its steps are done."""
        return self.starts_at + ticks * self.first_s + self.growth_s * (ticks * (ticks - 1) // 2)

    def ticks_until(self, now: float) -> int:
        """How many of its steps have begun at a time."""
        a, g, t = self.first_s, self.growth_s, now - self.starts_at
        b = a - g / 2
        guess = t / b if g * t < 1e-9 * b * b else (sqrt(b * b + 2 * g * t) - b) / g
        n = max(1, ceil(guess) - 1)
        while self.end_of(n) < now:  # corrects the rounding of the root
            n += 1
        return n
