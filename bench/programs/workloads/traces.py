"""The two workloads from real traces: coding-agent sessions, and requests that share prefixes (data/README.md)."""

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
# The sessions have contexts of up to 880,000 tokens. With all lengths halved, all but the longest fit into a model with
# a context of 131,072 tokens, and an engine's KV cache holds about twenty of them.
SCALE = 2
# Limits of such a model, and of an open-loop run of an hour. A session ends before its first prompt longer than
# MAX_PROMPT (240,000 tokens before scaling) and after MAX_CALLS calls; longer pauses are cut to MAX_PAUSE_S.
MAX_PROMPT = 120_000
MAX_CALLS = 60
MAX_PAUSE_S = 60.0
_BLOCK = 512
_OWN_TEXTS = 1_000_000
_TOOLS, _SYSTEMS = 1_000, 200_000  # shared texts are numbered by their lengths: equal length means equal text


@cache
def _lines(name: str) -> Sequence[Any]:
    with gzip.open(FOLDER / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def _sessions() -> Sequence[Any]:
    return [line for line in _lines("agent_sessions") if line["calls"][0][1] // SCALE <= MAX_PROMPT]


def coding(per_s: float, window_s: float, seed: int) -> list[ProgramSpec]:
    """Returns real sessions, drawn with replacement, with Poisson arrivals."""
    rng = Random(f"{seed}/sessions")
    return [session(rng.choice(_sessions()), n, at) for n, at in enumerate(poisson(per_s, window_s, seed))]


def session(line: Any, number: int, arrival_s: float) -> ProgramSpec:
    """Returns one session: tools and system prompt first (shared with sessions that have the same), then its own turns.

    A prompt extends the previous prompt and its answer. If it is too short to contain the answer, it extends only the
    prompt, since agents drop a model's reasoning. A prompt shorter than the previous one is a summary: everything after
    the shared head is new.
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
    """Returns requests in the trace's order and spacing, scaled to a mean rate. Each is a program; no answer is reused.

    The seed selects where in the trace to start. After its end the trace repeats from its beginning.
    """
    requests = _lines("prefix_blocks")
    first = Random(f"{seed}/prefix").randrange(len(requests))
    return list(takewhile(lambda p: p.arrival_s < window_s, _requests(requests, first, per_s)))


def _requests(requests: Sequence[Any], first: int, per_s: float) -> Iterator[ProgramSpec]:
    # The mean gap follows the last request.
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
