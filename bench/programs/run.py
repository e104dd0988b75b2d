"""Runs a plan. Every cell is cached under .bench, so an interrupted run resumes where it stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.metadata import version
from typing import Any

from bench.programs.cells import POOL, Cell, Outcome, outcome
from bench.programs.plan import Ablation, Plan, Sweep
from bench.programs.search import Curve, rate_of, rate_point
from bench.programs.systems import FCFS_RR, System
from bench.report.machine import machine
from bench.report.page import RESULTS


def run(plan: Plan, jobs: int = POOL) -> dict[str, Any]:
    """Measures everything in a plan; page.py and plots.py read the result."""
    began = time.perf_counter()
    with ProcessPoolExecutor(jobs) as pool:
        idle = [pool.submit(outcome, _cell(s, FCFS_RR, rate_point(s.lowest))) for s in plan.sweeps]
        levels = [[m * f.result().figures.per_token_mean for m in plan.levels] for f in idle]
        sweeps = [
            {system.name: pool.submit(sweep_one, s, system, at) for system in s.systems}
            for s, at in zip(plan.sweeps, levels, strict=True)
        ]
        ablations = [
            {v.name: pool.submit(outcome, Cell(a.workload, v.name, a.engines, a.rate, a.window_s)) for v in a.systems}
            for a in plan.ablations
        ]
        return {
            "machine": machine(f"{os.cpu_count()} cores, shared with others", f"rsm-engine {version('rsm-engine')}"),
            "levels": list(plan.levels),
            "sweeps": [_sweep(s, at, f) for s, at, f in zip(plan.sweeps, levels, sweeps, strict=True)],
            "ablations": [_ablation(a, f) for a, f in zip(plan.ablations, ablations, strict=True)],
            "wall_s": time.perf_counter() - began,
        }


def sweep_one(sweep: Sweep, system: System, levels: Sequence[float]) -> dict[str, Any]:
    """Measures one system's curve: the rates that it sustains at the levels, and all measured points."""
    found: dict[int, Outcome] = {}

    def measure(point: int) -> float:
        found[point] = outcome(_cell(sweep, system, point))
        return found[point].figures.per_token_mean

    curve = Curve(measure, rate_point(sweep.lowest), rate_point(sweep.highest))
    sustained = [curve.sustained(level) for level in levels]
    points = [{"rate": rate_of(p), **found[p].as_dict()} for p in sorted(found)]
    return {"sustained": sustained, "points": points}


def _cell(sweep: Sweep, system: System, point: int) -> Cell:
    return Cell(sweep.workload, system.name, sweep.engines, rate_of(point), sweep.window_s)


def _sweep(sweep: Sweep, levels: Sequence[float], found: Mapping[str, Future[dict[str, Any]]]) -> dict[str, Any]:
    systems = {}
    for system in sweep.systems:
        systems[system.name] = {"label": system.label, **found[system.name].result()}
        rates = ", ".join(f"{r:.3g}/s" for r in systems[system.name]["sustained"])
        print(f"  {sweep.workload}, {sweep.engines} engines, {system.label}: {rates}", flush=True)
    return _about(sweep) | {"highest": sweep.highest, "levels_s": list(levels), "systems": systems}


def _ablation(ablation: Ablation, found: Mapping[str, Future[Outcome]]) -> dict[str, Any]:
    systems = {s.name: {"label": s.label, **found[s.name].result().as_dict()} for s in ablation.systems}
    print(f"  {ablation.workload}, {ablation.engines} engines: {len(systems)} variants", flush=True)
    return _about(ablation) | {"rate": ablation.rate, "systems": systems}


def _about(runs: Sweep | Ablation) -> dict[str, Any]:
    return {"workload": runs.workload, "engines": runs.engines, "window_s": runs.window_s}


def write(plan: Plan, found: Mapping[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{plan.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
