"""The page of bench/programs/peers/__main__.py: the results, and the comparison with the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from bench.programs.live.samples import ENGINES, HIGH, KV_TOKENS, LOW, SLOTS, WORKLOADS
from bench.programs.peers.run import Run, as_dict
from bench.programs.peers.systems import System
from bench.programs.systems import OURS
from bench.report.page import Report, Target, targets_table
from bench.report.table import table_line
from rsm.simulation.workload.programs import ProgramSpec

# The workload of the runs at low load: all kinds together. Few programs arrive, so the window is longer.
ALL, LOW_WINDOWS = "all", 4


@dataclass(slots=True)
class Found:
    """All runs by workload and system, and the round trips of single calls in milliseconds; one of each per round.

    Attributes:
        chains: mean length of a program's longest chain of sequential calls at low load.
    """

    rounds: int
    window_s: float
    runs: dict[tuple[str, str], list[Run]] = field(default_factory=dict)
    round_trips_ms: dict[str, list[float]] = field(default_factory=dict)
    direct_ms: list[float] = field(default_factory=list)
    chains: list[float] = field(default_factory=list)

    def add(self, workload: str, system: str, run: Run) -> None:
        self.runs.setdefault((workload, system), []).append(run)

    def hop_ms(self, system: str) -> float:
        """Returns the extra time of a call through a system, compared with a direct call to a server."""
        return median(self.round_trips_ms[system]) - median(self.direct_ms)

    def median(self, workload: str, system: str, name: str) -> float:
        """Returns the median of one figure over the rounds."""
        values: list[float] = [getattr(run.figures, name) for run in self.runs[workload, system]]
        return median(values)

    def failed(self, workload: str, system: str) -> int:
        return sum(run.failed for run in self.runs[workload, system])

    @property
    def chain(self) -> float:
        return fmean(self.chains)

    @property
    def workloads(self) -> list[str]:
        return [w for w in (*WORKLOADS, ALL) if any(w == workload for workload, _ in self.runs)]


def line(label: str, run: Run) -> str:
    """Returns one run as a line of progress output."""
    f, c = run.figures, run.cost
    return (
        f"{label:38} {f.programs:3} programs, {run.wall_s:4.1f} s: mean {f.jct_mean:5.2f} s, p95 {f.jct_p95:5.2f} s, "
        f"hit {f.hit_rate:.2f}; cores {c.producer:.2f} + {c.between:.2f} + {c.servers:.2f} of {c.machine:.2f}, "
        f"late {c.late_s * 1000:.0f} ms"
    )


def report(about: Mapping[str, str], systems: Sequence[System], found: Found) -> Report:
    title, made_by = "Comparison with public routers", "make bench-peers"
    return Report(title, about, section(systems, found), data(systems, found), made_by, machine(systems, found))


def machine(systems: Sequence[System], found: Found) -> list[str]:
    """Returns the table of the machine's resources that the runs used."""
    return [
        "## The machine",
        "",
        "Average number of cores in use, and the longest delay of a timer in the producer: medians over all runs. When "
        "no core is idle, times describe the machine rather than the systems.",
        "",
        *_costs(systems, found),
    ]


def section(systems: Sequence[System], found: Found) -> list[str]:
    """Returns the tables and their text, also for docs/scheduling.md."""
    high = [w for w in found.workloads if w != ALL]
    lines = [
        f"{ENGINES} modelled engines, each with {SLOTS} slots and {KV_TOKENS:,} tokens of KV cache, first come, first "
        "served, with prefix caching, behind OpenAI's HTTP API (`rsm sim-server`). Scaled-down samples of the "
        f"workloads (bench/programs/live) arrive as a Poisson process, open loop, within {found.window_s:g} s. High "
        f"load is {HIGH:g} times the engines' maximum (all slots full, nothing computed twice). Low load is {LOW:g} "
        f"times the maximum, for {LOW_WINDOWS} times as long. Ours uses policy {OURS.policy}, and scheduler "
        f"{OURS.scheduler} inside its own engines. Medians of {found.rounds} interleaved rounds.",
        "",
    ]
    if high:
        lines += ["Completion time of a program at high load, mean / P95 in seconds:", ""]
        lines += [*_times(systems, found, high), "", "Share of the prompt tokens found in a cache at high load:", ""]
        lines += [*_hits(systems, found, high), ""]
    if ALL in found.workloads:
        lines += [
            "At low load, all kinds together. A hop is the median time of single calls minus that of the server alone:",
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
    lines = _head(systems, ("producer", "router or broker", "servers", "whole machine", "timer delay, ms"))
    for s in systems:
        costs = [run.cost for (_, label), runs in found.runs.items() if label == s.label for run in runs]
        cells = [median(getattr(c, name) for c in costs) for name in ("producer", "between", "servers", "machine")]
        late = median(c.late_s for c in costs) * 1000
        lines.append(table_line((_name(s), *(f"{c:.2f}" for c in cells), f"{late:.0f}")))
    return lines


def _name(system: System) -> str:
    return f"**{system.label}**" if system.ours else f"{system.name} {system.version()}, {system.mode}"


# -- comparison with the targets


def _verdict(systems: Sequence[System], found: Found) -> list[str]:
    """Compares ours with the best public router of the same run, and with the targets."""
    high = [w for w in found.workloads if w != ALL]
    ours = [s for s in systems if s.ours]
    lines = []
    if high and ours:
        lines += ["Completion time of a program at high load, best public router over ours:", ""]
        lines += [table_line(("Ours", "", *high, "Target", "Met"))]
        lines += [table_line(["---", "---", *["---:"] * len(high), "---", "---"])]
        lines += [_ratios(systems, found, s, figure, high) for s in ours for figure in _FIGURES]
    if ALL in found.workloads:
        lines += ["", *targets_table(target for s in ours if (target := _at_low_load(systems, found, s)))]
    return lines


_FIGURES = {"jct_mean": "mean", "jct_p95": "P95"}


def _ratios(systems: Sequence[System], found: Found, ours: System, figure: str, workloads: Sequence[str]) -> str:
    cells, met = [], True
    for workload in workloads:
        best = _best(systems, found, workload, figure)
        if best is None or found.failed(workload, ours.label):
            cells.append("")
            met = met and not found.failed(workload, ours.label)
            continue
        time, label = best
        ratio = time / found.median(workload, ours.label, figure)
        met = met and ratio > 1
        cells.append(f"{ratio:.2f} ({label})")
    return table_line((ours.label, _FIGURES[figure], *cells, "> 1 everywhere", "yes" if met else "**no**"))


def _best(systems: Sequence[System], found: Found, workload: str, figure: str) -> tuple[float, str] | None:
    """Returns the best time of the other systems without failed calls, and its system; None if there is none."""
    times = [
        (found.median(workload, s.label, figure), s.label)
        for s in systems
        if not s.ours and not found.failed(workload, s.label)
    ]
    return min(times, default=None)


def _at_low_load(systems: Sequence[System], found: Found, ours: System) -> Target | None:
    """Returns the target at low load: a program may take one hop longer for each call of its longest chain."""
    best = _best(systems, found, ALL, "jct_mean")
    if best is None:
        return None
    time, label = best
    later = found.median(ALL, ours.label, "jct_mean") - time
    hops = found.hop_ms(ours.label) / 1000 * found.chain
    met = later <= hops and not found.failed(ALL, ours.label)
    what = f"low load, mean completion time: {ours.label}, minus the best public router ({label})"
    aim = f"≤ {1000 * hops:.0f} ms, one hop for each of {found.chain:.1f} sequential calls"
    return Target(what, aim, f"{1000 * later:+.0f} ms", met)


def chain(programs: Sequence[ProgramSpec]) -> float:
    """Returns the length of a program's longest chain of sequential calls; the mean over programs."""
    return fmean(max(_depths(p)) for p in programs)


def _depths(program: ProgramSpec) -> list[int]:
    depths: list[int] = []
    for call in program.calls:
        depths.append(1 + max((depths[n] for n in call.after), default=0))
    return depths


def data(systems: Sequence[System], found: Found) -> dict[str, Any]:
    return {
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
