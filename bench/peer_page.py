"""The page of bench/program_peers.py: what was found, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.peer_run import Run, as_dict
from bench.peer_samples import ENGINES, HIGH, KV_TOKENS, LOW, SLOTS, WORKLOADS
from bench.peer_systems import System
from bench.table import table_line

# The workload of the runs at low load: all kinds side by side.
ALL = "all"
DOCS = Path(__file__).resolve().parent.parent / "docs" / "scheduling.md"
BEGIN, END = "<!-- peers: made by `make bench-peers` -->", "<!-- /peers -->"


@dataclass(slots=True)
class Found:
    """All runs by workload and system, and the round trips of single calls in milliseconds; one of each a round."""

    rounds: int
    window_s: float
    runs: dict[tuple[str, str], list[Run]] = field(default_factory=dict)
    round_trips_ms: dict[str, list[float]] = field(default_factory=dict)
    direct_ms: list[float] = field(default_factory=list)

    def add(self, workload: str, system: str, run: Run) -> None:
        self.runs.setdefault((workload, system), []).append(run)

    def hop_ms(self, system: str) -> float:
        """What a call takes longer through a system than straight to a server."""
        return median(self.round_trips_ms[system]) - median(self.direct_ms)

    def median(self, workload: str, system: str, name: str) -> float:
        """The median over the rounds of one of the figures."""
        values: list[float] = [getattr(run.figures, name) for run in self.runs[workload, system]]
        return median(values)

    def failed(self, workload: str, system: str) -> int:
        return sum(run.failed for run in self.runs[workload, system])

    @property
    def workloads(self) -> list[str]:
        return [w for w in (*WORKLOADS, ALL) if any(w == workload for workload, _ in self.runs)]


def line(label: str, run: Run) -> str:
    """One run, for people who wait."""
    f, c = run.figures, run.cost
    return (
        f"{label:38} {f.programs:3} programs, {run.wall_s:4.1f} s: mean {f.jct_mean:5.2f} s, p95 {f.jct_p95:5.2f} s, "
        f"hit {f.hit_rate:.2f}; cores {c.producer:.2f} + {c.between:.2f} + {c.servers:.2f} of {c.machine:.2f}, "
        f"late {c.late_s * 1000:.0f} ms"
    )


def page(about: Mapping[str, str], systems: Sequence[System], found: Found) -> str:
    lines = [f"# Beside public routers: {about['Machine']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "Machine"]
    lines += ["", *section(systems, found), "", "## The machine", ""]
    lines += [
        "Cores in use on average, and the worst lateness of a timer of the producer: medians over all runs. Where the "
        "machine has none left, times say more of the machine than of the systems.",
        "",
        *_costs(systems, found),
        "",
        "Made by `make bench-peers`.",
        "",
    ]
    return "\n".join(lines)


def section(systems: Sequence[System], found: Found) -> list[str]:
    """The tables and what they say, also for docs/scheduling.md."""
    high = [w for w in found.workloads if w != ALL]
    lines = [
        f"{ENGINES} modelled engines of {SLOTS} slots and {KV_TOKENS:,} tokens of KV cache, first come, first served, "
        "with prefix caching, behind OpenAI's HTTP API (`rsm sim-server`). Samples of the workloads, made small "
        f"(bench/peer_samples.py), come as a Poisson process within {found.window_s:g} s, whatever became of those "
        f"before. High load is {HIGH:g} of what the engines can do with all slots full and nothing computed twice, low "
        f"load {LOW:g}. Medians of {found.rounds} interleaved rounds.",
        "",
    ]
    if high:
        lines += ["Completion time of a program at high load, mean / P95 in seconds:", ""]
        lines += [*_times(systems, found, high), "", "Share of the prompt tokens found in a cache at high load:", ""]
        lines += [*_hits(systems, found, high), ""]
    if ALL in found.workloads:
        lines += [
            "At low load, all kinds side by side; a hop is the median of single calls, less the server's own:",
            "",
        ]
        lines += [*_low(systems, found), ""]
    return [*lines, *_verdict(systems, found)]


def _head(systems: Sequence[System], columns: Sequence[str]) -> list[str]:
    return [table_line(("System", *columns)), table_line(["---", *["---:"] * len(columns)])]


def _times(systems: Sequence[System], found: Found, workloads: Sequence[str]) -> list[str]:
    lines = _head(systems, workloads)
    for s in systems:
        lines.append(table_line([_name(s), *(_time(found, w, s.label) for w in workloads)]))
    return lines


def _time(found: Found, workload: str, label: str) -> str:
    failed = found.failed(workload, label)
    if failed:
        return f"{failed} calls failed"
    mean, p95 = (found.median(workload, label, name) for name in ("jct_mean", "jct_p95"))
    return f"{mean:.2f} / {p95:.2f}"


def _hits(systems: Sequence[System], found: Found, workloads: Sequence[str]) -> list[str]:
    lines = _head(systems, workloads)
    for s in systems:
        lines.append(table_line([_name(s), *(f"{found.median(w, s.label, 'hit_rate'):.0%}" for w in workloads)]))
    return lines


def _low(systems: Sequence[System], found: Found) -> list[str]:
    lines = _head(systems, ("mean / P95, s", "latency per token, ms", "hop, ms"))
    for s in systems:
        token = found.median(ALL, s.label, "per_token_mean") * 1000
        lines.append(table_line((_name(s), _time(found, ALL, s.label), f"{token:.1f}", f"{found.hop_ms(s.label):.1f}")))
    return lines


def _costs(systems: Sequence[System], found: Found) -> list[str]:
    lines = _head(systems, ("producer", "between", "servers", "machine, of all", "late, ms"))
    for s in systems:
        costs = [run.cost for (_, label), runs in found.runs.items() if label == s.label for run in runs]
        cells = [median(getattr(c, name) for c in costs) for name in ("producer", "between", "servers", "machine")]
        late = median(c.late_s for c in costs) * 1000
        lines.append(table_line((_name(s), *(f"{c:.2f}" for c in cells), f"{late:.0f}")))
    return lines


def _name(system: System) -> str:
    return f"**{system.label}**" if system.ours else f"{system.name} {system.version()}, {system.mode}"


def _verdict(systems: Sequence[System], found: Found) -> list[str]:
    lines = []
    for ours in (s for s in systems if s.ours):
        parts = [part for w in found.workloads if (part := _beside_best(systems, found, w, ours))]
        lines.append(f"- Best public router over {ours.label}, mean completion time: {', '.join(parts)}.")
    return lines


def _beside_best(systems: Sequence[System], found: Found, workload: str, ours: System) -> str:
    """How many times as long programs take through the best of the others that lost no call; "" = there is none."""
    times = {
        s.label: found.median(workload, s.label, "jct_mean")
        for s in systems
        if not s.ours and not found.failed(workload, s.label)
    }
    if not times:
        return ""
    best = min(times, key=lambda label: times[label])
    more = times[best] / found.median(workload, ours.label, "jct_mean")
    return f"{'low load' if workload == ALL else workload} {more:.2f} ({best})"


def into_docs(systems: Sequence[System], found: Found, path: Path = DOCS) -> None:
    """Puts the section between its marks in docs/scheduling.md, if they are there."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    head, mark, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if mark and end:
        path.write_text("\n".join([head + mark, "", *section(systems, found), "", end + tail]), encoding="utf-8")


def data(about: Mapping[str, str], systems: Sequence[System], found: Found) -> dict[str, Any]:
    return {
        "machine": about,
        "rounds": found.rounds,
        "window_s": found.window_s,
        "direct_ms": found.direct_ms,
        "systems": [
            {
                "name": s.name,
                "mode": s.mode,
                "version": s.version(),
                "round_trip_ms": found.round_trips_ms[s.label],
                "runs": {w: [as_dict(r) for r in found.runs[w, s.label]] for w in found.workloads},
            }
            for s in systems
        ],
    }
