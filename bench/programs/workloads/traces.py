"""The two real workloads: coding-agent sessions, and requests that share prefixes (traces/README.md)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from random import Random
from typing import Any

from bench.programs.workloads.synthetic import poisson
from rsm.simulation.workload.programs import CallSpec, ProgramSpec, Segment

FOLDER = Path(__file__).resolve().parent / "data"
# The sessions were made with contexts of up to 880,000 tokens. Half of every length puts all but the longest into a
# model with a context of 131,072 tokens; the KV cache of an engine then holds about twenty of them.
SCALE = 2
# What such a model may not take, and what no open-loop run of an hour can wait for, is cut off: calls from the first
# one that is longer than this (240,000 tokens before scaling), calls after so many, pauses beyond so many seconds.
MAX_PROMPT = 120_000
MAX_CALLS = 60
MAX_PAUSE_S = 60.0
_BLOCK = 512
_OWN_TEXTS = 1_000_000
_TOOLS, _SYSTEMS = 1_000, 200_000  # the common texts are numbered by their lengths: equal length, equal text


@cache
def _lines(name: str) -> Sequence[Any]:
    with gzip.open(FOLDER / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def _sessions() -> Sequence[Any]:
    return [line for line in _lines("agent_sessions") if line["calls"][0][1] // SCALE <= MAX_PROMPT]


def coding(per_s: float, window_s: float, seed: int) -> list[ProgramSpec]:
    """Real sessions, drawn with replacement, with Poisson arrivals."""
    rng = Random(f"{seed}/sessions")
    return [session(rng.choice(_sessions()), n, at) for n, at in enumerate(poisson(per_s, window_s, seed))]


def session(line: Any, number: int, arrival_s: float) -> ProgramSpec:
    """One session: tools and system prompt first (shared with sessions that have the same), then its own turns.

    A prompt goes on behind the one before and its answer, or without the answer where it is too short to hold it (an
    agent drops what a model thought aloud). A prompt shorter than the one before is a summary: behind the common head
    all is new.
    """
    head = (
        Segment(_TOOLS + line["tool_tokens"], line["tool_tokens"] // SCALE),
        Segment(_SYSTEMS + line["system_tokens"], line["system_tokens"] // SCALE),
    )
    contexts: tuple[tuple[Segment, ...], ...] = (head,)
    calls: list[CallSpec] = []
    for n, (_, tokens, output, _, think_s) in enumerate(line["calls"][:MAX_CALLS]):
        wanted, output = tokens // SCALE, max(1, output // SCALE)
        if wanted > MAX_PROMPT:
            break
        text = number * _OWN_TEXTS + _OWN_TEXTS + 2 * n
        context = next((c for c in contexts if _length(c) <= wanted), head)
        prompt = (*context, Segment(text, max(1, wanted - _length(context))))
        calls.append(CallSpec(prompt, output, text + 1, (n - 1,) if n else (), min(think_s, MAX_PAUSE_S) if n else 0.0))
        contexts = ((*prompt, Segment(text + 1, output)), prompt)
    return ProgramSpec(f"coding-{number}", "coding", arrival_s, tuple(calls))


def _length(context: Sequence[Segment]) -> int:
    return sum(s.tokens for s in context)


def prefix(per_s: float, window_s: float, seed: int) -> list[ProgramSpec]:
    """Requests in the trace's order and spacing, at another mean rate, each a program of its own; no answer is reused.

    The trace is walked from a place given by the seed, and again from its beginning where it ends.
    """
    requests = _lines("prefix_blocks")
    first = Random(f"{seed}/prefix").randrange(len(requests))
    return list(takewhile(lambda p: p.arrival_s < window_s, _requests(requests, first, per_s)))


def _requests(requests: Sequence[Any], first: int, per_s: float) -> Iterator[ProgramSpec]:
    # The last request has a gap behind it, too: the mean one.
    span_ms = requests[-1]["timestamp"] * len(requests) / (len(requests) - 1)
    scale = len(requests) / span_ms / per_s
    for number in count(first):
        turn, index = divmod(number, len(requests))
        line = requests[index]
        yield _request(line, number, (turn * span_ms + line["timestamp"] - requests[first]["timestamp"]) * scale)


def _request(line: Any, number: int, at: float) -> ProgramSpec:
    ids = line["hash_ids"]
    sizes = [*[_BLOCK] * (len(ids) - 1), line["input_length"] - (len(ids) - 1) * _BLOCK]
    prompt = tuple(Segment(_OWN_TEXTS + i, size) for i, size in zip(ids, sizes, strict=True))
    return ProgramSpec(f"prefix-{number}", "prefix", at, (CallSpec(prompt, line["output_length"]),))
