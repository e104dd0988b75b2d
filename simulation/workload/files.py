"""Workload files: one program per line, as JSON.

    {"id": "p1", "kind": "chat", "arrival_s": 0.0, "calls": [
        {"prompt": [[1, 256], [1000, 80]], "output_tokens": 120, "answer": 1001},
        {"prompt": [[1, 256], [1000, 80], [1001, 120], [1002, 40]], "output_tokens": 60, "after": [0], "delay_s": 8.0}]}

A prompt is a list of [text, tokens]; programs.py describes the fields. `kind`, `answer`, `after`, `delay_s` and `child`
are optional.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rsm.broker.errors import InvalidRequest
from rsm.simulation.workload.programs import CallSpec, ProgramSpec, Segment


def read_workload(path: Path) -> list[ProgramSpec]:
    """Reads the programs of a file.

    Raises:
        InvalidRequest: it cannot be read; the message names the line.
    """
    programs: list[ProgramSpec] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise InvalidRequest(f"The workload {path} cannot be read: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise InvalidRequest(f"The workload {path} cannot be read: it is not text in UTF-8.") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            programs.append(_program(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise InvalidRequest(f"Line {number} of {path} is not a valid program: {type(e).__name__}: {e}") from e
    return programs


def write_workload(path: Path, programs: Iterable[ProgramSpec]) -> None:
    """Writes programs for `read_workload`."""
    path.write_text("".join(f"{json.dumps(_line(p), separators=(',', ':'))}\n" for p in programs), encoding="utf-8")


def _program(read: Any) -> ProgramSpec:
    calls = tuple(_call(c, n) for n, c in enumerate(read["calls"]))
    if not calls:
        raise ValueError("a program needs at least one call")
    return ProgramSpec(str(read["id"]), str(read.get("kind", "")), _positive(read["arrival_s"]), calls)


def _call(read: Any, number: int) -> CallSpec:
    prompt = tuple(Segment(int(text), int(tokens)) for text, tokens in read["prompt"])
    after = tuple(int(n) for n in read.get("after", ()))
    output = int(read["output_tokens"])
    if not prompt or min(s.tokens for s in prompt) < 1 or output < 1:
        raise ValueError(f"call {number} needs at least one prompt token and one output token")
    if any(not 0 <= n < number for n in after):
        raise ValueError(f"call {number} can only wait for earlier calls")
    answer, child = int(read.get("answer", 0)), str(read.get("child", ""))
    return CallSpec(prompt, output, answer, after, _positive(read.get("delay_s", 0.0)), child)


def _positive(value: Any) -> float:
    seconds = float(value)
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{value!r} is not a time; give seconds, at least 0")
    return seconds


def _line(program: ProgramSpec) -> dict[str, Any]:
    calls = [
        {
            "prompt": [list(s) for s in c.prompt],
            "output_tokens": c.output_tokens,
            "answer": c.answer,
            "after": list(c.after),
            "delay_s": c.delay_s,
            "child": c.child,
        }
        for c in program.calls
    ]
    return {"id": program.id, "kind": program.kind, "arrival_s": program.arrival_s, "calls": calls}
