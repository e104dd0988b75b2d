"""The plans of the benchmark, quick and full: sweeps over rates on fleets of several sizes, and ablations.

Windows are as long as two CPU cores can simulate in the time of a run, which is short compared with a fleet's life. So
at rates beyond capacity a backlog builds up during the window and is then worked off, as in a burst.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.programs.systems import ABLATIONS, FCFS_RR, MAIN, ROUTING, SCALING, System

# Levels of the mean latency at which throughputs are compared. They are multiples of the latency of FCFS + round robin
# at the lowest rate of the sweep, which is nearly idle: a fleet at its knee, and far beyond it.
LEVELS = (3.0, 10.0)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Systems on one workload and fleet, over rates from `lowest` to `highest` programs per second."""

    workload: str
    engines: int
    window_s: float
    lowest: float
    highest: float
    systems: Sequence[System]


@dataclass(frozen=True, slots=True)
class Ablation:
    """Variants at one rate, beyond the fleet's knee."""

    workload: str
    engines: int
    window_s: float
    rate: float
    systems: Sequence[System]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `name`: name of the result files. `levels`: like LEVELS."""

    name: str
    sweeps: Sequence[Sweep]
    ablations: Sequence[Ablation]
    levels: Sequence[float] = LEVELS


_FOUR = [
    Sweep("mixed", 4, 150, 0.5, 32, (*MAIN, *ROUTING)),
    Sweep("coding", 4, 900, 1 / 16, 4, (*MAIN, *ROUTING)),
    Sweep("uneven", 4, 150, 0.5, 32, (FCFS_RR, *ROUTING)),
    Sweep("chat", 4, 120, 8, 256, MAIN),
    Sweep("react", 4, 150, 1, 64, MAIN),
    Sweep("tree", 4, 150, 0.5, 16, MAIN),
    Sweep("prefix", 4, 60, 4, 256, MAIN),
]
_SIZES = [
    Sweep("mixed", 1, 300, 1 / 8, 16, SCALING),
    Sweep("coding", 1, 1800, 1 / 64, 1, SCALING),
    Sweep("mixed", 16, 30, 8, 128, SCALING),
    Sweep("coding", 16, 450, 1 / 4, 4, SCALING),
    Sweep("mixed", 64, 8, 32, 256, SCALING),
    Sweep("coding", 64, 225, 2, 8, SCALING),
]
_ABLATIONS = [Ablation("mixed", 4, 150, 8.0, ABLATIONS), Ablation("coding", 4, 900, 0.25, ABLATIONS)]

FULL = Plan("programs", [*_FOUR, *_SIZES], _ABLATIONS)
QUICK = Plan(
    "programs-quick", [replace(s, window_s=s.window_s / 3, systems=SCALING) for s in _FOUR[:2]], [], LEVELS[:1]
)
