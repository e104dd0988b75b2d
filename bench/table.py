"""The benchmark's result table: medians of the runs of each system, as markdown and JSON.

A run is the JSON object that a peer, or our own half, prints as its last line.
`write("laptop", runs, server)` puts `laptop.md` and `laptop.json` into bench/results.
As a script: `python bench/table.py NAME RUNS.jsonl --server "Valkey 9.1.2"`, one run a line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).resolve().parent / "results"
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
        """Read a run from the line that a system printed; fields unknown here are left out."""
        record = json.loads(line)
        return cls(**{field.name: record[field.name] for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of a figure over the runs, with its least and greatest value."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return cls(median(ordered), ordered[0], ordered[-1])

    def text(self, digits: int) -> str:
        if self.least == self.greatest:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} [{self.least:,.{digits}f}-{self.greatest:,.{digits}f}]"


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
            raise ValueError(f"runs of {first.name} differ in their versions")
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
    """Return one row a system, the highest throughput first."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    return sorted((Row.of(group) for group in by_name.values()), key=lambda row: -row.calls_per_s.median)


def machine(name: str, server: str) -> dict[str, str]:
    """Return what the page says of the machine; it goes by the caller's `name`, never by its host name."""
    return {
        "Machine": name,
        "CPU": f"{cpu_model()}, {os.cpu_count()} cores",
        "OS": f"{os_name()}, {platform.system()} {platform.release().partition('-')[0]}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "Server": server,
    }


def cpu_model() -> str:
    """Return the processor's name as the kernel or, elsewhere, the platform module tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.platform(terse=True)


def server_name(info: Mapping[str, object]) -> str:
    """Return a server's name and version from its INFO; Valkey's `redis_version` is a compatibility level."""
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}"


def render(about: Mapping[str, str], rows: list[Row]) -> str:
    """Return the whole page."""
    lines = [f"# Benchmark: {about['Machine']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "Machine"]
    lines += ["", "Medians of the runs, with least and greatest in brackets.", ""]
    lines += [table_line(COLUMNS), table_line(["---"] * 3 + ["---:"] * 4)]
    lines += [table_line(row.cells()) for row in rows]
    lines += ["", *(f"- {row.name}: {row.note}." for row in rows)]
    return "\n".join(lines) + "\n"


def table_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write(name: str, runs: Iterable[Run], server: str, folder: Path = RESULTS) -> Path:
    """Write NAME.md and NAME.json and return the path of the former."""
    about, runs = machine(name, server), list(runs)
    rows = summarise(runs)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{name}.md"
    page.write_text(render(about, rows), encoding="utf-8")
    data = {"machine": about, "rows": [asdict(row) for row in rows], "runs": [asdict(run) for run in runs]}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return page


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="what to call the machine, and the files")
    parser.add_argument("runs", type=Path, help="a file with one run, as JSON, a line")
    parser.add_argument("--server", required=True, help='the server measured against, as "Valkey 9.1.2"')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    lines = args.runs.read_text(encoding="utf-8").splitlines()
    print(write(args.name, [Run.parse(line) for line in lines if line.strip()], args.server))


if __name__ == "__main__":
    main()
