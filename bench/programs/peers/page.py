"""The page of bench/programs/peers/__main__.py: what was found, and the verdict."""

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

# The workload of the runs at low load: all kinds side by side. Few programs come, so they have more time to.
ALL, LOW_WINDOWS = "all", 4


@dataclass(slots=True)
class Found:
    """All runs by workload and system, and the round trips of single calls in milliseconds; one of each a round.

    Attributes:
        chains: how many calls follow one another in a program at low load, in the mean.
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
        """What a call takes longer through a system than straight to a server."""
        return median(self.round_trips_ms[system]) - median(self.direct_ms)

    def median(self, workload: str, system: str, name: str) -> float:
        """The median over the rounds of one of the figures."""
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
    """One run, for people who wait."""
    f, c = run.figures, run.cost
    return (
        f"{label:38} {f.programs:3} programs, {run.wall_s:4.1f} s: mean {f.jct_mean:5.2f} s, p95 {f.jct_p95:5.2f} s, "
        f"hit {f.hit_rate:.2f}; cores {c.producer:.2f} + {c.between:.2f} + {c.servers:.2f} of {c.machine:.2f}, "
        f"late {c.late_s * 1000:.0f} ms"
    )


def report(about: Mapping[str, str], systems: Sequence[System], found: Found) -> Report:
    title, made_by = "Beside public routers", "make bench-peers"
    return Report(title, about, section(systems, found), data(systems, found), made_by, machine(systems, found))


def machine(systems: Sequence[System], found: Found) -> list[str]:
    """What the runs took of the machine."""
    return [
        "## The machine",
        "",
        "Cores in use on average, and the worst lateness of a timer of the producer: medians over all runs. Where the "
        "machine has none left, times say more of the machine than of the systems.",
        "",
        *_costs(systems, found),
    ]


def section(systems: Sequence[System], found: Found) -> list[str]:
    """The tables and what they say, also for docs/scheduling.md."""
    high = [w for w in found.workloads if w != ALL]
    lines = [
        f"{ENGINES} modelled engines of {SLOTS} slots and {KV_TOKENS:,} tokens of KV cache, first come, first served, "
        "with prefix caching, behind OpenAI's HTTP API (`rsm sim-server`). Samples of the workloads, made small "
        f"(bench/programs/live), come as a Poisson process within {found.window_s:g} s, whatever became of those "
        f"before. High load is {HIGH:g} of what the engines can do with all slots full and nothing computed twice, low "
        f"load {LOW:g}, for {LOW_WINDOWS} times as long. Ours has policy {OURS.policy}, and inside its own engines "
        f"scheduler {OURS.scheduler}. Medians of {found.rounds} interleaved rounds.",
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


# -- who is ahead


def _verdict(systems: Sequence[System], found: Found) -> list[str]:
    """Ours beside the best public router of the same run, and whether that is what was aimed at."""
    high = [w for w in found.workloads if w != ALL]
    ours = [s for s in systems if s.ours]
    lines = []
    if high and ours:
        lines += ["Best public router over ours at high load, completion time of a program:", ""]
        lines += [table_line(("Ours", "", *high, "Target", "Met"))]
        lines += [table_line(["---", "---", *["---:"] * len(high), "---", "---"])]
        lines += [_ahead(systems, found, s, figure, high) for s in ours for figure in _FIGURES]
    if ALL in found.workloads:
        lines += ["", *targets_table(target for s in ours if (target := _at_low_load(systems, found, s)))]
    return lines


_FIGURES = {"jct_mean": "mean", "jct_p95": "P95"}


def _ahead(systems: Sequence[System], found: Found, ours: System, figure: str, workloads: Sequence[str]) -> str:
    cells, met = [], True
    for workload in workloads:
        best = _best(systems, found, workload, figure)
        if best is None or found.failed(workload, ours.label):
            cells.append("")
            met = met and not found.failed(workload, ours.label)
            continue
        time, label = best
        more = time / found.median(workload, ours.label, figure)
        met = met and more > 1
        cells.append(f"{more:.2f} ({label})")
    return table_line((ours.label, _FIGURES[figure], *cells, "> 1 everywhere", "yes" if met else "**no**"))


def _best(systems: Sequence[System], found: Found, workload: str, figure: str) -> tuple[float, str] | None:
    """The best of the others that lost no call; None = there is none."""
    times = [
        (found.median(workload, s.label, figure), s.label)
        for s in systems
        if not s.ours and not found.failed(workload, s.label)
    ]
    return min(times, default=None)


def _at_low_load(systems: Sequence[System], found: Found, ours: System) -> Target | None:
    """A program may take longer by one hop for each call of its longest chain."""
    best = _best(systems, found, ALL, "jct_mean")
    if best is None:
        return None
    time, label = best
    later = found.median(ALL, ours.label, "jct_mean") - time
    hops = found.hop_ms(ours.label) / 1000 * found.chain
    met = later <= hops and not found.failed(ALL, ours.label)
    what = f"low load, mean completion time: {ours.label}, behind the best public router ({label})"
    aim = f"≤ {1000 * hops:.0f} ms, a hop for each of {found.chain:.1f} calls in a row"
    return Target(what, aim, f"{1000 * later:+.0f} ms", met)


def chain(programs: Sequence[ProgramSpec]) -> float:
    """How many calls follow one another in a program, at most; the mean over programs."""
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
