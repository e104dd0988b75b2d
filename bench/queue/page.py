"""The page of `make bench`: targets, results, and comparison with the peers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench.report.machine import machine
from bench.report.page import RESULTS, Target, targets_table
from bench.report.table import Spread, table_line

OURS = "rsm-engine"


CEILING = "raw streams"


BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def targets(rows: list[Row], ours: Mapping[str, Any]) -> list[Target]:
    """Returns the targets, each with its measurement from the same run."""
    us = next(r for r in rows if r.name == OURS)
    peers = [r for r in rows if r.name not in (OURS, CEILING)]
    best = max(peers, key=lambda r: r.calls_per_s.median)
    p50, p99 = min(r.rtt_p50_ms.median for r in peers), min(r.rtt_p99_ms.median for r in peers)
    ratio = us.calls_per_s.median / best.calls_per_s.median
    trips = {k.removeprefix("trips_"): v for k, v in ours.items() if k.startswith("trips_")}
    return [
        Target("calls/s, 100 in flight", f"≥ 4 times {best.name}", f"{ratio:.1f} times", ratio >= 4),
        Target("round trip at low load, p50", "≤ 1 ms", f"{us.rtt_p50_ms.median:.2f} ms", us.rtt_p50_ms.median <= 1),
        Target(
            "… p50 below every peer's", f"< {p50:.2f} ms", f"{us.rtt_p50_ms.median:.2f} ms", us.rtt_p50_ms.median < p50
        ),
        Target(
            "… p99 below every peer's", f"< {p99:.2f} ms", f"{us.rtt_p99_ms.median:.2f} ms", us.rtt_p99_ms.median < p99
        ),
        _at_least("router alone, assignments/s per process", ours["assignments_per_s"], 20_000),
        _below("a call's time in the router, p99, ms", ours["call_p99_ms"], 1),
        _below("cancel: flag set → abort in the worker, p50, ms", ours["cancel_p50_ms"], 2),
        _below("… p99, ms", ours["cancel_p99_ms"], 10),
        _below("router's memory, MiB", ours["router_mib"], 64),
        _below(f"worker's memory beyond {ours['library']}, MiB", ours["worker_mib"], 10),
        *(_below(f"round trips to Redis per call, {name}", value, 1) for name, value in trips.items()),
    ]


def limits(ours: Mapping[str, Any]) -> str:
    """Says what limits the throughput, from the CPU time measured in the same run."""
    spent_us = {k.removeprefix("cpu_"): v for k, v in ours.items() if k.startswith("cpu_")}
    spent = ", ".join(f"{process} {value:.0f}" for process, value in spent_us.items())
    total, cores = sum(spent_us.values()), os.cpu_count() or 1
    return (
        f"Limits: a call takes {total:.0f} µs of CPU time in total ({spent}), so {cores} cores can do "
        f"{cores * 1e6 / total:,.0f} calls/s if nothing else runs and no core idles. Redis runs scripts on one core, "
        f"which limits the throughput to {1e6 / spent_us['server']:,.0f} calls/s. At low load a round trip is six "
        "wake-ups of four processes."
    )


def _below(what: str, value: float, limit: float) -> Target:
    return Target(what, f"≤ {limit:g}", f"{value:.2f}", value <= limit)


def _at_least(what: str, value: float, limit: float) -> Target:
    return Target(what, f"≥ {limit:,.0f}", f"{value:,.0f}", value >= limit)


def into_docs(page: Path, docs: Path) -> None:
    """Puts the tables of a page between the two bench marks of docs/performance.md."""
    head, rest = docs.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    docs.write_text(head + excerpt(page) + tail, encoding="utf-8")


def excerpt(page: Path) -> str:
    """Returns what docs/performance.md shows of a page: everything below its title."""
    body = page.read_text(encoding="utf-8").split("\n", 1)[1].strip()
    return f"{BEGIN}\n{body}\n{END}"


def write(name: str, runs: Iterable[Run], ours: Mapping[str, Any], server: str, folder: Path = RESULTS) -> Path:
    """Writes NAME.md and NAME.json; returns the path of the page."""
    runs = list(runs)
    about = machine(f"{os.cpu_count()} cores, shared with others", server)
    rows = summarise(runs)
    lines = ["", "## Targets", "", *targets_table(targets(rows, ours))]
    lines += ["", limits(ours), "", "Made by `make bench`.", ""]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    path.write_text(render(about, rows) + "\n".join(lines), encoding="utf-8")
    data = {"machine": about, "runs": [{f: getattr(r, f) for f in Run.__slots__} for r in runs], "ours": dict(ours)}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return path


COLUMNS = ("System", "Version", "redis-py", "Runs", "Calls/s", "Round trip p50, ms", "p99, ms")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one system."""

    name: str
    version: str
    redis_py: str
    calls_per_s: float
    rtt_p50_ms: float
    rtt_p99_ms: float
    note: str

    @classmethod
    def parse(cls, line: str) -> Run:
        """Reads a run from the line that a system printed; ignores unknown fields."""
        record = json.loads(line)
        return cls(**{field.name: record[field.name] for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Row:
    """One system's line in the table."""

    name: str
    version: str
    redis_py: str
    runs: int
    calls_per_s: Spread
    rtt_p50_ms: Spread
    rtt_p99_ms: Spread
    note: str

    @classmethod
    def of(cls, runs: list[Run]) -> Row:
        first = runs[0]
        if any((run.version, run.redis_py) != (first.version, first.redis_py) for run in runs):
            raise ValueError(f"The runs of {first.name} have different versions. Repeat the benchmark.")
        return cls(
            name=first.name,
            version=first.version,
            redis_py=first.redis_py,
            runs=len(runs),
            calls_per_s=Spread.of(run.calls_per_s for run in runs),
            rtt_p50_ms=Spread.of(run.rtt_p50_ms for run in runs),
            rtt_p99_ms=Spread.of(run.rtt_p99_ms for run in runs),
            note=first.note,
        )

    def cells(self) -> tuple[str, ...]:
        figures = (self.calls_per_s.text(0), self.rtt_p50_ms.text(2), self.rtt_p99_ms.text(2))
        return (self.name, self.version, self.redis_py, str(self.runs), *figures)


def summarise(runs: Iterable[Run]) -> list[Row]:
    """Returns one row per system, the highest throughput first."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    return sorted((Row.of(group) for group in by_name.values()), key=lambda row: -row.calls_per_s.median)


def render(about: Mapping[str, str], rows: list[Row]) -> str:
    """Returns the part of the page that compares the systems."""
    lines = [f"# Benchmark: {about['Machine']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "Machine"]
    lines += ["", "Medians of the runs, with minimum and maximum in brackets.", ""]
    lines += [table_line(COLUMNS), table_line(["---"] * 3 + ["---:"] * 4)]
    lines += [table_line(row.cells()) for row in rows]
    lines += ["", *(f"- {row.name}: {row.note}." for row in rows)]
    return "\n".join(lines) + "\n"
