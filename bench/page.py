"""The page of results: what was aimed at, what came out, and beside whom."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.table import RESULTS, Row, Run, machine, render, summarise, table_line

OURS = "rsm-engine"
CEILING = "raw streams"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
DOCS = Path(__file__).resolve().parent.parent / "docs" / "scheduling.md"


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the table of aims."""

    what: str
    aim: str
    got: str
    met: bool

    def cells(self) -> tuple[str, ...]:
        return self.what, self.aim, self.got, "yes" if self.met else "**no**"


@dataclass(frozen=True, slots=True)
class Report:
    """A benchmark's results: `section` is also for docs/scheduling.md, `more` is not; `data` is all figures."""

    title: str
    about: Mapping[str, str]
    section: Sequence[str]
    data: Mapping[str, Any]
    command: str
    more: Sequence[str] = ()

    def page(self) -> str:
        lines = [f"# {self.title}: {self.about['Machine']}", ""]
        lines += [f"- {key}: {value}" for key, value in self.about.items() if key != "Machine"]
        return "\n".join(
            [*lines, "", *self.section, *([""] if self.more else []), *self.more, "", f"Made by `{self.command}`.", ""]
        )


def targets(rows: list[Row], ours: Mapping[str, Any]) -> list[Target]:
    """The issue's targets, each beside its measurement from this very run."""
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
        _at_least("router alone, assignments/s a process", ours["assignments_per_s"], 20_000),
        _below("a call's time in the router, p99, ms", ours["call_p99_ms"], 1),
        _below("cancel: flag set → abort in the worker, p50, ms", ours["cancel_p50_ms"], 2),
        _below("… p99, ms", ours["cancel_p99_ms"], 10),
        _below("router's memory, MiB", ours["router_mib"], 64),
        _below(f"our part of a worker, MiB, over {ours['library']}", ours["worker_mib"], 10),
        *(_below(f"round trips to Redis a call, {name}", value, 1) for name, value in trips.items()),
    ]


def limits(ours: Mapping[str, Any]) -> str:
    """What bounds the throughput, from the processor time that was measured in the same run."""
    parts = {k.removeprefix("cpu_"): v for k, v in ours.items() if k.startswith("cpu_")}
    spent = ", ".join(f"{part} {value:.0f}" for part, value in parts.items())
    total, cores = sum(parts.values()), os.cpu_count() or 1
    return (
        f"What limits it: a call takes {total:.0f} µs of processor time in all ({spent}), so {cores} cores can do "
        f"{cores * 1e6 / total:,.0f} calls/s if nothing else runs and no core waits; Redis runs scripts on one core, "
        f"which bounds it at {1e6 / parts['server']:,.0f}. At low load a round trip is six wake-ups of four processes."
    )


def _below(what: str, value: float, limit: float) -> Target:
    return Target(what, f"≤ {limit:g}", f"{value:.2f}", value <= limit)


def _at_least(what: str, value: float, limit: float) -> Target:
    return Target(what, f"≥ {limit:,.0f}", f"{value:,.0f}", value >= limit)


def targets_table(found: Iterable[Target]) -> list[str]:
    return [
        table_line(("What", "Target", "Measured", "Met")),
        table_line(["---", "---", "---:", "---"]),
        *(table_line(t.cells()) for t in found),
    ]


def into_docs(mark: str, section: Sequence[str], docs: Path = DOCS) -> bool:
    """Puts lines between <!-- MARK --> and <!-- /MARK --> of a document; False, and a word of it: it lacks them."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    text = docs.read_text(encoding="utf-8") if docs.exists() else ""
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        print(f"{docs.name} is left alone: it has no {begin} … {end}")
        return False
    docs.write_text("\n".join([head + begin, "", *section, "", end + tail]), encoding="utf-8")
    return True


def into_readme(page: Path, readme: Path) -> None:
    """Puts the tables of a page between the README's two bench marks, so that its figures are those of a run."""
    head, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(head + excerpt(page) + tail, encoding="utf-8")


def excerpt(page: Path) -> str:
    """What the README shows of a page: everything below its title, one level deeper."""
    body = page.read_text(encoding="utf-8").split("\n", 1)[1].strip().replace("## ", "### ")
    return f"{BEGIN}\n{body}\n{END}"


def write(name: str, runs: Iterable[Run], ours: Mapping[str, Any], server: str, folder: Path = RESULTS) -> Path:
    """Writes NAME.md and NAME.json; returns the path of the former."""
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


def here(**more: str) -> dict[str, str]:
    """What a page says of the machine and, by name, of whatever else took part."""
    about = machine(f"{os.cpu_count()} cores, shared with others", "")
    return {key: value for key, value in about.items() if value} | more


def publish(report: Report, name: str, folder: Path = RESULTS, docs: Path = DOCS) -> None:
    """Writes NAME.md and NAME.json, shows the former, and puts its section between the marks of that name."""
    text = report.page()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    data = {"machine": report.about, **report.data}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print(text)
    into_docs(name.replace("_", "-"), report.section, docs)
