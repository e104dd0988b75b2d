"""`make fuzz INPUTS=100000`: this many malformed inputs for all decoders together, and as many entries for a router.

Writes bench/results/fuzz.md and fuzz.json; ends with status 1 if anything crashed or hung.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.machine import machine
from bench.report.page import RESULTS
from tests.fuzz.decoders import DECODERS
from tests.fuzz.entries import Passage, pass_through
from tests.fuzz.run import Tally, fuzz

# How much a router may grow between the first tenth of a run and its end.
_GROWTH_MIB = 32.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", default="unnamed", help="what the page calls this machine; never its host name")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # readers log each entry that they skip
    each = -(-args.inputs // len(DECODERS))
    tallies = []
    for decoder in DECODERS:
        tallies.append(fuzz(decoder, each, args.seed))
        sys.stdout.write(row(tallies[-1]) + "\n")
        sys.stdout.flush()
    passage = pass_through(args.inputs, args.seed)
    text = page(machine(args.machine, passage.server), tallies, passage)
    sys.stdout.write(text)
    write(args.out, machine(args.machine, passage.server), tallies, passage, text)
    sys.exit(not sound(tallies, passage))


def sound(tallies: Sequence[Tally], p: Passage) -> bool:
    """No crash, no good call lost, no entry left, no router that grows with the entries that it rejects."""
    stalled = p.answered != p.good or p.left or p.pending
    return not any(t.crashes for t in tallies) and not stalled and p.rss_late_mib - p.rss_early_mib < _GROWTH_MIB


def row(t: Tally) -> str:
    return f"| {t.name} | {t.inputs} | {t.refused} | {len(t.crashes)} | {t.slowest_s * 1000:.1f} |"


def page(about: Mapping[str, str], tallies: Sequence[Tally], p: Passage) -> str:
    total = sum(t.inputs for t in tallies)
    lines = [
        "# Malformed input",
        "",
        "Written by `make fuzz`.",
        "",
        *(f"* {name}: {value}" for name, value in about.items()),
        "",
        f"{total} inputs to decoders, {sum(len(t.crashes) for t in tallies)} crashes.",
        "",
        "| decoder | inputs | refused by contract | crashes | slowest input, ms |",
        "|---|---|---|---|---|",
        *map(row, tallies),
        "",
        "A router process on a real Redis, a good call after each 500 malformed entries:",
        "",
        "| entries | good calls | answered | left on the stream | pending | FAILED records | dead letters "
        "| router RSS early / late, MiB | slowest good call, s | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| {p.entries} | {p.good} | {p.answered} | {p.left} | {p.pending} | {p.failed} | {p.dead_letters} "
        f"| {p.rss_early_mib:.1f} / {p.rss_late_mib:.1f} | {p.slowest_good_s:.2f} | {p.seconds:.0f} |",
        "",
    ]
    return "\n".join(lines)


def write(folder: Path, about: Mapping[str, str], tallies: Sequence[Tally], passage: Passage, text: str) -> None:
    decoders: list[dict[str, Any]] = [
        {"name": t.name, "inputs": t.inputs, "refused": t.refused, "crashes": t.crashes, "slowest_s": t.slowest_s}
        for t in tallies
    ]
    data = {"machine": about, "decoders": decoders, "router": passage.as_row()}
    (folder / "fuzz.json").write_text(json.dumps(data, indent=2) + "\n")
    (folder / "fuzz.md").write_text(text)


if __name__ == "__main__":
    main()
