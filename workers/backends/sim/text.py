"""The texts of a modelled engine: tokens without a tokenizer, and answers that are a function of the prompt."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any
from zlib import crc32

from rsm.workers.backends.base import CallRejected

VOCABULARY = 32_000
EOS = 2
_FIRST_WORD = 3  # ids below are special, as in most vocabularies
_CYCLE = 1 << 15

# About 4 characters per token. No token spans a space, so an answer that is part of a later prompt gives the same ids.
_TOKEN = re.compile(r" w[0-9]{1,5}(?![0-9])|\s?\S{1,4}|\s+(?=\s\S)|\s+")
# A text that consists of printed ids. Benchmarks send these, and they are read ten times faster.
_IDS = re.compile(r"(?: w(?:[1-9][0-9]{1,4}|[013-9]))++")


def tokenize(text: str) -> list[int]:
    """The token ids of a text. A longer text keeps the ids of its prefix, except the last one."""
    if _IDS.fullmatch(text):
        return [int(word) % VOCABULARY for word in text[2:].split(" w")]
    return [_token_id(token) for token in _TOKEN.findall(text)]


def token_text(token: int) -> str:
    """The printable form of an id."""
    return "" if token == EOS else f" w{token}"


@lru_cache(maxsize=1 << 16)
def _token_id(token: str) -> int:
    if token.startswith(" w") and token[2:].isdecimal() and token_text(int(token[2:])) == token:
        return int(token[2:]) % VOCABULARY
    return _FIRST_WORD + crc32(token.encode("utf-8", "surrogatepass")) % (VOCABULARY - _FIRST_WORD)


class _Words:
    """Two copies of one long cycle of words. An answer is a slice, so a long one needs no loop."""

    def __init__(self) -> None:
        words = [crc32(n.to_bytes(4, "little")) % (VOCABULARY - _FIRST_WORD) + _FIRST_WORD for n in range(_CYCLE)]
        self.ids = words * 2
        self.text = "".join(map(token_text, self.ids))
        self.ends = [0, *accumulate(len(token_text(token)) for token in self.ids)]

    def chars(self, start: int, count: int) -> int:
        rounds, rest = divmod(count, _CYCLE)
        return rounds * self.ends[_CYCLE] + self.ends[start + rest] - self.ends[start]

    def slice(self, start: int, count: int) -> tuple[list[int], str]:
        rounds = -(-count // _CYCLE)
        ids = self.ids[start : start + min(count, _CYCLE)]
        text = self.text[self.ends[start] : self.ends[start + min(count, _CYCLE)]]
        if rounds > 1:
            ids, text = (ids * rounds)[:count], (text * rounds)[: self.chars(start, count)]
        return ids, text


@cache
def _words() -> _Words:
    return _Words()


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole answer to one prompt.

    Attributes:
        held: characters held back while it streams, because a stop string may begin in them.
    """

    ids: list[int] = field(repr=False)
    text: str = field(repr=False)
    finish_reason: str
    start: int
    held: int = 0

    def chars(self, tokens: int) -> int:
        """The characters of the first `tokens` tokens."""
        return min(_words().chars(self.start, tokens), len(self.text))

    def released(self, tokens: int) -> int:
        """The characters that may be published after `tokens` tokens."""
        if tokens >= len(self.ids):
            return len(self.text)
        return max(0, min(_words().chars(self.start, tokens) - self.held, len(self.text)))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and the seed of its answer. It has either `text` or `ids`."""

    text: str = field(default="", repr=False)
    ids: list[int] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, value: Any) -> Prompt:
        """Reads the prompt of a body.

        Raises:
            CallRejected: it is neither text nor token ids, or empty.
        """
        if isinstance(value, str) and value:
            return cls(text=value)
        if isinstance(value, list) and value:
            return cls(ids=value)
        raise CallRejected("The prompt must be a non-empty text or list of token ids.")

    def size(self) -> int:
        """The number of its tokens."""
        if self.ids:
            return len(self.ids)
        return self.text.count(" w") if _IDS.fullmatch(self.text) else len(_TOKEN.findall(self.text))

    def tokens(self) -> list[int]:
        """Its token ids."""
        return self.ids or tokenize(self.text)

    def origin(self) -> tuple[int, int]:
        """The seed of the answer, and how many words of that answer the prompt ends with.

        A greedy model that reads the beginning of its own answer continues it; that is how an attempt resumes on
        another server. Only for text prompts; a prompt that itself ends in words of this form is not recognized.
        """
        words = [] if _IDS.fullmatch(self.text) else _trailing_words(self.text)
        if words:
            head = Prompt(self.text.removesuffix("".join(words)))
            if head.text and _words().slice(head.seed() % _CYCLE, len(words))[1] == "".join(words):
                return head.seed(), len(words)
        return self.seed(), 0

    def seed(self) -> int:
        """A number derived from the prompt, the same in every process.

        Raises:
            CallRejected: its ids are not whole numbers of at least 0.
        """
        if self.text:
            return crc32(self.text.encode("utf-8", "surrogatepass"))
        try:
            return crc32(array("Q", self.ids).tobytes())
        except (TypeError, OverflowError) as e:
            raise CallRejected("Token ids must be whole numbers, at least 0.") from e


def _trailing_words(text: str) -> list[str]:
    """The words at the end of a text that have the form of an answer's words."""
    words, end = [], len(text)
    while (at := text.rfind(" w", 0, end)) >= 0 and text[at + 2 : end].isdecimal():
        words.append(text[at:end])
        end = at
    return words[::-1]


def answer(seed: int, limit: int, stops: tuple[str, ...] = (), eos_mean: int = 0, skip: int = 0) -> Answer:
    """The answer to a prompt with this seed: at most `limit` tokens, fewer if it ends with EOS or at a stop string.

    `eos_mean` 0: it never ends with EOS. `skip`: how many of its tokens are already in the prompt. As in vLLM, the text
    ends before a stop string, the ids after it.
    """
    start = (seed + skip) % _CYCLE
    length, reason = limit, "length"
    if eos_mean and (own := max(1, 1 + crc32(seed.to_bytes(4, "little")) % (2 * eos_mean) - skip)) < limit:
        length, reason = own, "stop"
    ids, text = _words().slice(start, length)
    if reason == "stop":
        ids.append(EOS)
    found = Answer(ids, text, reason, start, max(map(len, stops), default=1) - 1)
    return _stopped(found, stops) if stops else found


def _stopped(whole: Answer, stops: tuple[str, ...]) -> Answer:
    """The answer up to the first complete stop string."""
    hits = [(at + len(stop), at) for stop in stops if (at := whole.text.find(stop)) >= 0]
    if not hits:
        return whole
    end, at = min(hits)
    tokens = bisect_left(range(len(whole.ids)), end, key=whole.chars)
    return Answer(whole.ids[:tokens], whole.text[:at], "stop", whole.start, whole.held)
