"""Measures a new program's short call on a real vLLM engine that is full of long programs' calls.

    python -m bench.vllm waits --scheduler plas|priority|fcfs --out FOLDER [--cases cost,slots,kv] [--no-async]

Cases:
- cost: all slots decode, with contexts of 64 and of 1024 tokens, and no call waits: the cost of planning a step.
- slots: more long calls than slots (--longs) arrive at once; then short calls arrive one by one, before and after the
  first long call has ended.
- kv: the same with long prompts, so that the KV cache is full while slots are free.

Long calls belong to programs that have used much service, and have the level that the router would assign. `same`
compares the tokens of two runs, call by call:

    python -m bench.vllm same FOLDER FOLDER
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
from collections import defaultdict
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.vllm.engine import Call, Engine, Phase, started
from rsm.simulation.calibration.step_costs import Timed

_LONG_SERVICE, _LONG_LEVEL = 300_000, 5
_SHORT_PROMPT, _SHORT_OUTPUT, _SHORTS = 200, 32, 30
_COST_STEPS = 100
# A step is full if at least this share of the slots decodes in it; not all of them, since some calls come and go.
_FULL = 0.98


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", default="cost,slots,kv")
    parser.add_argument("--longs", type=float, default=1.5, help="Long calls per slot in case slots.")
    parser.add_argument("--long", type=int, nargs=2, default=(400, 1200), help="Output tokens of long calls.")
    parser.add_argument("--prompt", type=int, default=8000, help="Prompt tokens of long calls in case kv.")
    parser.add_argument(
        "--wait-s", type=float, default=3.0, help="Seconds until the first short call; then one every sixth of it."
    )


async def run(args: argparse.Namespace) -> None:
    dice = random.Random(1)
    async with started(args) as engine:

        async def full(name: str, count: int, prompt: int) -> None:
            longs = [_long(engine, f"{name} long {n}", prompt, dice.randint(*args.long)) for n in range(count)]
            await engine.phase(name, *longs, _shorts(engine, f"{name} short", _SHORTS, args.wait_s / 6, args.wait_s))

        for n in range(5):
            await engine.phase("alone", _shorts(engine, f"alone {n} short", 1, 0.0, 0.0))
        for case in args.cases.split(","):
            if case == "cost":
                await _cost(engine)
            elif case == "slots":
                await full(case, int(args.longs * engine.slots), 256)
            else:
                await full(case, int(1.5 * engine.kv_tokens / (args.prompt + sum(args.long) / 2)), args.prompt)
        taken = await engine.steps()
    found = [summary(p, taken, engine.calls, engine.slots) for p in engine.phases]
    report = {"engine": engine.described(), "scheduler": args.scheduler, "phases": found}
    (args.out / "waits.json").write_text(json.dumps(report))
    print("\n".join(line for r in found for line in lines(r)))


def _long(engine: Engine, name: str, prompt: int, output: int) -> Awaitable[Call]:
    return engine.call(name, prompt, output, _LONG_SERVICE, _LONG_LEVEL)


async def _shorts(engine: Engine, name: str, count: int, every_s: float, after_s: float) -> None:
    async def later(n: int) -> None:
        await asyncio.sleep(after_s + n * every_s)
        await engine.call(f"{name} {n}", _SHORT_PROMPT, _SHORT_OUTPUT)

    await asyncio.gather(*(later(n) for n in range(count)))


async def _cost(engine: Engine) -> None:
    for context in (64, 1024):
        more = _COST_STEPS + engine.slots * context // engine.step_tokens
        if engine.slots * (context + more) <= engine.kv_tokens:
            calls = (_long(engine, f"cost {context} {n}", context, more) for n in range(engine.slots))
            await engine.phase(f"cost {context}", *calls)


# -- results


def summary(phase: Phase, taken: Sequence[Timed], calls: Sequence[Call], slots: int) -> dict[str, Any]:
    """Returns the figures of a phase; times in ms."""
    of_phase = [t for t in taken if phase.holds(t.step.planned_from)]
    decode = [t for t in of_phase if not t.step.prefill_tokens]
    full = [t for t in decode if t.step.decode_seqs >= _FULL * slots]
    came = [c for c in calls if phase.holds(c.came)]
    return {
        "phase": phase.name,
        "s": phase.ended - phase.began,
        "decode": _steps(decode),
        "full": _steps(full),
        "preempted": sum(t.step.preempted for t in of_phase),
        "short_ms": [1000 * (c.ended - c.came) for c in came if " short " in c.name],
        "short_first_ms": [1000 * (c.first - c.came) for c in came if " short " in c.name],
        "short_came_s": [c.came - phase.began for c in came if " short " in c.name],
        "long_ended_s": sorted(c.ended - phase.began for c in came if " long " in c.name),
    }


def _steps(some: Sequence[Timed]) -> dict[str, float]:
    if not some:
        return {}
    return {
        "steps": len(some),
        "ms": 1000 * median(t.seconds for t in some),
        "mean_ms": 1000 * sum(t.seconds for t in some) / len(some),
        "planning_ms": 1000 * median(t.step.planned_to - t.step.planned_from for t in some),
        "mean_planning_ms": 1000 * sum(t.step.planned_to - t.step.planned_from for t in some) / len(some),
        "update_ms": 1000 * median(t.step.done_to - t.step.done_from for t in some),
    }


def lines(r: dict[str, Any]) -> Iterator[str]:
    line = f"{r['phase']:10}{r['s']:6.2f} s"
    for label in ("decode", "full"):
        if f := r[label]:
            line += f" | {label} {f['steps']} steps, {f['ms']:.3f} ms (mean {f['mean_ms']:.3f}), planning "
            line += f"{f['planning_ms']:.3f} (mean {f['mean_planning_ms']:.3f}), update {f['update_ms']:.3f}"
    yield f"{line} | preempted {r['preempted']}"
    if r["short_ms"]:
        yield "   short calls, first token, ms: " + " ".join(f"{v:.0f}" for v in r["short_first_ms"])
        yield "   short calls, end, ms:         " + " ".join(f"{v:.0f}" for v in r["short_ms"])
    if ends := r["long_ended_s"]:
        yield f"   long calls ended after {ends[0]:.1f} s, {median(ends):.1f} s, {ends[-1]:.1f} s"


def same(one: Path, other: Path) -> Iterator[str]:
    """Yields, for each kind of call, how many have the same tokens in both runs."""
    a, b = _tokens(one), _tokens(other)
    by_kind = defaultdict(list)
    for name in sorted(a.keys() & b.keys()):
        by_kind[re.sub(r"[ \d]+$", "", name)].append(name)
    for kind, names in by_kind.items():
        differ = [n for n in names if a[n] != b[n]]
        at = [next((i for i, (x, y) in enumerate(zip(a[n], b[n], strict=False)) if x != y), -1) for n in differ]
        where = f", the others differ from token {median(at):.0f} on (median)" if at else ""
        words = len({token for n in names for token in a[n]})
        yield f"{kind:14} {len(names) - len(differ)} of {len(names)} are the same{where}; {words} distinct tokens"


def differing(one: Path, other: Path) -> tuple[int, list[str]]:
    """Returns the number of calls that two runs have in common, and the names of those whose tokens differ."""
    a, b = _tokens(one), _tokens(other)
    common = sorted(a.keys() & b.keys())
    return len(common), [name for name in common if a[name] != b[name]]


def _tokens(folder: Path) -> dict[str, list[int]]:
    """Returns the tokens of each call of a run."""
    found: dict[str, list[int]] = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    return found
