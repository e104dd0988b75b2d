"""Measures a short call on an engine full of long programs' calls, on the CPU: vLLM's own schedulers and ours.

    python -m bench.vllm cpu [--rounds 3] [--name waits]

Each run is `bench.vllm waits --cases slots` with the tiny model, in its own process; the schedulers take turns. Many
more long calls than slots arrive at once, then short calls arrive one by one. Only short calls that arrive while long
calls wait for a slot are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.report.machine import here
from bench.report.page import Report, Target, publish, targets_table
from bench.report.table import Spread, table_line
from bench.vllm.waits import differing

BASE, OURS = "priority", "plas"
# The tokens of the others are compared with those of the first.
LABELS = {BASE: "vLLM, priority", "fcfs": "vLLM, fcfs", OURS: "vLLM with our plug-in (plas)"}
_PHASE, _SLOTS, _LONGS = "slots", 8, 3.0
# A run takes seconds on the CPU, and all contexts fit into the cache, so that only slots are scarce.
_WAITS = ("--long", "500", "3000", "--longs", str(_LONGS), "--wait-s", "1.5", "--cases", _PHASE)
_ENGINE = {
    "max_num_seqs": _SLOTS,
    "max_model_len": 4096,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 128 << 20,
    "enforce_eager": True,
}
# One thread per process, because more threads than cores slow each other down.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_RUN_S = 240
_AIM = 3.0
Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="waits", help="Name of the result files in bench/results.")


def measure(rounds: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Returns the runs of each scheduler, one per round, and the description of the engine."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in LABELS}
    engine: dict[str, Any] = {}
    for turn in range(rounds):
        with tempfile.TemporaryDirectory(prefix="rsm-waits-") as folder:
            for name in LABELS:
                report = _run(name, Path(folder) / name)
                engine = report["engine"]
                phase = next(p for p in report["phases"] if p["phase"] == _PHASE)
                run = figures(phase, _SLOTS) | compare(Path(folder) / BASE, Path(folder) / name)
                runs[name].append(run)
                print(f"round {turn + 1} of {rounds}, {name}: {_summary(run)}", flush=True)
    return runs, engine


def _run(scheduler: str, out: Path) -> dict[str, Any]:
    from rsm.workers.backends.vllm.start.tiny_model import ensure_tiny_model

    out.mkdir()
    options = [f"--engine-arg={name}={json.dumps(value)}" for name, value in _ENGINE.items()]
    command = [sys.executable, "-m", "bench.vllm", "waits", "--scheduler", scheduler, "--out", str(out)]
    command += ["--model", str(ensure_tiny_model()), *_WAITS, *options]
    with (out / "log").open("wb") as log:
        done = subprocess.run(command, env=os.environ | _ENVIRONMENT, stdout=log, stderr=log, timeout=_RUN_S)
    if done.returncode:
        log_tail = (out / "log").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"vLLM with {scheduler} failed with status {done.returncode}:\n{log_tail}")
    report: dict[str, Any] = json.loads((out / "waits.json").read_text(encoding="utf-8"))
    return report


def figures(phase: Mapping[str, Any], slots: int) -> dict[str, Any]:
    """Returns a run's figures in ms: median and maximum over the short calls that came while long ones waited."""
    ends = phase["long_ended_s"]
    full_until = ends[-slots - 1] if len(ends) > slots else 0.0
    counted = [n for n, came in enumerate(phase["short_came_s"]) if came < full_until]
    if not counted:
        raise ValueError(
            "No short call came while all slots were taken and long calls waited. Use more or longer long calls."
        )
    found: dict[str, Any] = {"shorts": len(counted), "preempted": phase["preempted"], "long_s": ends[-1]}
    for name, key in (("first", "short_first_ms"), ("end", "short_ms")):
        values = [phase[key][n] for n in counted]
        found |= {f"{name}_ms": median(values), f"{name}_worst_ms": max(values)}
    return found | {"step_ms": phase["decode"]["ms"]}


def compare(one: Path, other: Path) -> dict[str, int]:
    """Counts the calls that two runs have in common, and those whose tokens differ."""
    compared, differ = differing(one, other)
    return {"compared": compared, "differ": len(differ)}


def _summary(run: Mapping[str, Any]) -> str:
    return f"first token {run['first_ms']:.0f} ms, end {run['end_ms']:.0f} ms, {run['preempted']} preempted"


# -- the table


def section(runs: Runs, engine: Mapping[str, Any]) -> list[str]:
    rounds = len(runs[OURS])
    head = (
        "Scheduler",
        "short call: first token, ms",
        "end, ms",
        "worst end, ms",
        "last long call done after, s",
        "preemptions",
    )
    return [
        f"vLLM {engine['vllm']} ({engine['device']}) with the tiny model and {engine['slots']} slots. Long calls, "
        f"{_LONGS:g} times as many as slots, arrive at once; then short calls of new programs arrive one by one. Only "
        f"short calls that arrive while long ones wait for slots are counted. Medians of {rounds} interleaved rounds, "
        "with minimum and maximum.",
        "",
        table_line((*head, "same tokens as vLLM, priority")),
        table_line(["---", *["---:"] * len(head)]),
        *(_line(name, list(of)) for name, of in runs.items()),
        "",
        *targets_table(targets(runs)),
    ]


def _line(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    def cell(key: str, digits: int = 0) -> str:
        return Spread.of(run[key] for run in runs).text(digits)

    compared, differ = (sum(run[key] for run in runs) for key in ("compared", "differ"))
    same = f"{compared - differ} of {compared} calls"
    times = (cell("first_ms"), cell("end_ms"), cell("end_worst_ms"), cell("long_s", 1))
    return table_line((LABELS[name], *times, cell("preempted"), same))


def targets(runs: Runs) -> list[Target]:
    found = []
    for key, what in (("first_ms", "first token"), ("end_ms", "end")):
        ratios = [base[key] / ours[key] for base, ours in zip(runs[BASE], runs[OURS], strict=True)]
        got = f"{Spread.of(ratios).text(1)} times"
        what = f"a short call's {what}: vLLM's priority over ours"
        found.append(Target(what, f"≥ {_AIM:g} times", got, median(ratios) >= _AIM))
    differ, compared = (sum(run[key] for run in runs[OURS]) for key in ("differ", "compared"))
    got = f"{compared - differ} of {compared} calls"
    return [*found, Target("same tokens as vLLM's priority", "all", got, compared > 0 and not differ)]


async def run(args: argparse.Namespace) -> None:
    runs, engine = measure(args.rounds)
    versions = {"vLLM": f"{engine['vllm']}, torch {engine['torch']}, {engine['dtype']}"}
    data = {"engine": engine, "runs": runs}
    command = "python -m bench.vllm cpu"
    title = "A short call on a full engine"
    publish(Report(title, here(**versions), section(runs, engine), data, command), args.name)
