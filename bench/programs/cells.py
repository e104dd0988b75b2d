"""A cell of the benchmark: one workload at one rate on one system, run in virtual time and cached under .bench."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from bench.programs.metrics import Figures, ProgramRun
from bench.programs.systems import SYSTEMS, System
from bench.programs.workloads.synthetic import KINDS, synthetic
from bench.programs.workloads.traces import coding, prefix
from rsm.broker.settings import Settings
from rsm.simulation.fleet import FleetConfig, SimFleet
from rsm.simulation.workload.programs import ProgramSpec
from rsm.workers.backends.sim.config import SimConfig, SimTimes

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".bench" / "programs"
# The files that a figure depends on; a change to any of them invalidates the cache.
_SOURCES = (
    "simulation/**/*.py",
    "router/[!mr]*.py",
    "router/policies/*.py",
    "router/work_stealing/decision.py",
    "workers/backends/sim/*.py",
    "workers/meters/*.py",
    "workers/scheduling/[ps]*.py",
    "broker/protocol/lua/modules/programs.lua",
    "broker/protocol/lua/modules/residents.lua",
    "bench/programs/[!ps_]*.py",
    "bench/programs/workloads/*.py",
    "bench/results/h200-steps.json",
)
# Seconds during which programs arrive; longer for longer programs. A run ends when its last program has ended.
# "uneven" is the mixed workload on a fleet where every fourth engine is half as fast as the others.
WINDOW_S = {"uneven": 60.0, "chat": 60.0, "react": 60.0, "tree": 60.0, "mixed": 60.0, "coding": 900.0, "prefix": 60.0}
WORKLOADS = tuple(WINDOW_S)
SLOWNESS = {"uneven": (1.0, 1.0, 1.0, 2.0)}
POOL = 2
# Costs of vLLM's steps with an 8B model on an H200, and its capacity: measured and fitted by `python -m bench.vllm`.
_STEPS = ROOT / "bench" / "results" / "h200-steps.json"


@dataclass(frozen=True, slots=True)
class Cell:
    """Identifies a run. `rate`: programs per second that arrive at the whole fleet."""

    workload: str
    system: str
    engines: int
    rate: float
    window_s: float
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run. `busy`: share of the engines' time until the end of the run in which they computed."""

    figures: Figures
    busy: float
    preemptions: int
    until_s: float
    wall_s: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Outcome:
        return cls(**(data | {"figures": Figures(**data["figures"])}))


@cache
def engine() -> SimConfig:
    """Returns the measured engine that all cells use, with the fit that has exactly the simulator's costs."""
    measured = json.loads(_STEPS.read_text())
    known = {f.name for f in fields(SimTimes)}
    costs = next(fit["costs"] for fit in measured["fits"] if fit["costs"].keys() == known)
    about = measured["engine"]
    return SimConfig(
        max_num_seqs=about["slots"],
        kv_tokens=about["kv_tokens"],
        max_num_batched_tokens=about["step_tokens"],
        times=SimTimes(**costs),
    )


def programs(cell: Cell) -> list[ProgramSpec]:
    """Returns the cell's workload."""
    if cell.workload in (*KINDS, "mixed", "uneven"):
        kind = "mixed" if cell.workload == "uneven" else cell.workload
        return synthetic(kind, cell.rate, cell.window_s, cell.seed)
    make = {"coding": coding, "prefix": prefix}[cell.workload]
    return make(cell.rate, cell.window_s, cell.seed)


def fleet(system: System, engines: int, sim: SimConfig, slowness: tuple[float, ...] = (1.0,)) -> FleetConfig:
    """Returns the simulator's configuration of a system."""
    names = {f.name for f in fields(SimConfig)}
    changes = {k: v for k, v in system.fleet.items() if k in names}
    more = {k: v for k, v in system.fleet.items() if k not in names}
    return FleetConfig(
        engines=engines,
        sim=SimConfig(**{n: getattr(sim, n) for n in names} | {"scheduler": system.scheduler} | changes),
        policy=system.policy,
        settings=Settings(**system.settings),
        by_program=system.by_program,
        slowness=slowness,
        **more,
    )


def simulate(cell: Cell) -> Outcome:
    """Runs a cell."""
    sim = engine()
    work = programs(cell)
    system, slowness = SYSTEMS[cell.system], SLOWNESS.get(cell.workload, (1.0,))
    results = SimFleet(fleet(system, cell.engines, sim, slowness), cell.seed).run(work)
    runs = [ProgramRun.of(p, sim.times, results.until_s) for p in results.programs]
    busy = sum(e.busy_s for e in results.engines) / (cell.engines * results.until_s)
    return Outcome(Figures.of(runs), busy, sum(e.preemptions for e in results.engines), results.until_s, results.wall_s)


# -- the cache


def outcome(cell: Cell) -> Outcome:
    """Returns a cell's outcome: the cached one, if the current code made it."""
    path = CACHE / f"{_key(cell)}.json"
    if path.exists():
        return Outcome.from_dict(json.loads(path.read_text())["outcome"])
    found = simulate(cell)
    CACHE.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps({"cell": asdict(cell), "outcome": found.as_dict()}))
    draft.rename(path)
    return found


def outcomes(cells: Iterable[Cell], jobs: int = POOL) -> Iterator[tuple[Cell, Outcome]]:
    """Yields the outcomes of many cells in the given order; runs `jobs` at a time."""
    cells = list(cells)
    with ProcessPoolExecutor(jobs) as pool:
        yield from zip(cells, pool.map(outcome, cells), strict=True)


def _key(cell: Cell) -> str:
    named = json.dumps([asdict(cell), asdict(SYSTEMS[cell.system]), fingerprint()], sort_keys=True)
    return blake2b(named.encode(), digest_size=12).hexdigest()


@cache
def fingerprint() -> str:
    """Returns a hash of the code that figures depend on."""
    digest = blake2b(digest_size=12)
    for source in _SOURCES:
        for file in sorted(ROOT.glob(source)):
            digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
