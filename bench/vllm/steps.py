"""Measures the steps of a real vLLM engine, over all kinds of steps that occur.

    python -m bench.vllm steps --out FOLDER [--model FOLDER] [--engine-arg NAME=JSON …]

Prints a line for each kind, then the best fit of the costs in the simulator's `SimTimes`, and its error on calls that
arrive at random and are not part of the fit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from bench.vllm.engine import Engine, Phase, started
from rsm.simulation.calibration.step_costs import COSTS, Error, Timed, error, fit

_DECODE_STEPS = 48
# Numbers of calls that decode at once, by context length.
_GRID = {
    64: (1, 8, 32, 64, 128, 192, 256),
    1024: (1, 16, 64, 128, 256),
    4096: (1, 8, 32, 64),
    16384: (1, 4, 16),
    31000: (1, 8),
}
_PROMPTS = (64, 256, 512, 1024, 2048, 4096, 8000)
_MIXED = "mixed"
# The costs of SimTimes, and the same with the cost of attention in long prompts.
MODELS = (tuple(COSTS)[:4], tuple(COSTS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mixed-s", type=float, default=20.0, help="Seconds during which calls arrive at random.")
    parser.add_argument("--rate", type=float, default=12.0, help="Random calls per second.")


async def run(args: argparse.Namespace) -> None:
    async with started(args) as engine:
        longest = engine.longest - 300
        for prompt in (p for p in _PROMPTS if p <= longest):
            for n in range(4):
                await engine.phase(f"prefill {prompt}", engine.call(f"prefill {prompt} {n}", prompt, 2))
        for context, batches in _GRID.items():
            for batch in (b for b in batches if _fits(engine, b, context)):
                await decode(engine, batch, context)
        await mixed(engine, args.mixed_s, args.rate, min(8000, longest))
        taken = await engine.steps()
    report = {"engine": engine.described(), "kinds": kinds(taken, engine.phases), "fits": fits(taken, engine.phases)}
    (args.out / "fit.json").write_text(json.dumps(report, indent=1))
    print("\n".join(lines(report)))


def _fits(engine: Engine, batch: int, context: int) -> bool:
    more = _DECODE_STEPS + context * batch // engine.step_tokens
    return batch <= engine.slots and context + more <= engine.longest and batch * (context + more) <= engine.kv_tokens


async def decode(engine: Engine, batch: int, context: int) -> None:
    """Runs calls that decode at once. The first ones start before the last prompt is computed, so all are long enough
    to overlap."""
    more = _DECODE_STEPS + context * batch // engine.step_tokens
    name = f"decode {batch} x {context}"
    await engine.phase(name, *(engine.call(f"{name} {n}", context, more) for n in range(batch)))


async def mixed(engine: Engine, seconds: float, rate: float, longest: int) -> None:
    """Runs calls of all lengths that arrive at random times."""
    dice, arrivals, at = random.Random(_MIXED), [], 0.0

    async def later(at: float, prompt: int, output: int) -> None:
        await asyncio.sleep(at)
        await engine.call(f"{_MIXED} {at}", prompt, output)

    while (at := at + dice.expovariate(rate)) < seconds:
        prompt, output = int(dice.lognormvariate(6.7, 1.0)) + 8, int(dice.lognormvariate(4.8, 0.8)) + 2
        arrivals.append(later(at, min(prompt, longest), min(output, 290)))
    await engine.phase(_MIXED, *arrivals)


# -- results


def of_phases(taken: Iterable[Timed], phases: Sequence[Phase], *names: str) -> list[Timed]:
    """Returns the steps of the phases whose names start with one of `names`."""
    chosen = [p for p in phases if p.name.startswith(names)]
    return [t for t in taken if any(p.holds(t.step.planned_from) for p in chosen)]


def kinds(taken: Sequence[Timed], phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """Returns the medians of each kind of step: those with and without prompt tokens, in each phase."""
    found = []
    for name in dict.fromkeys(p.name for p in phases):
        of_name = of_phases(taken, [p for p in phases if p.name == name], name)
        for prefill in (False, True):
            some = [t for t in of_name if bool(t.step.prefill_tokens) is prefill]
            if some:
                found.append(
                    {
                        "phase": name,
                        "prefill": prefill,
                        "steps": len(some),
                        "ms": 1000 * median(t.seconds for t in some),
                        "planning_ms": 1000 * median(t.step.planned_to - t.step.planned_from for t in some),
                        "tokens_per_s": sum(t.step.prefill_tokens + t.step.decode_seqs for t in some)
                        / sum(t.seconds for t in some),
                    }
                )
    return found


def fits(taken: Sequence[Timed], phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """Returns each model's costs, and its errors on the fitted steps and on others."""
    known, unknown = of_phases(taken, phases, "decode", "prefill"), of_phases(taken, phases, _MIXED)
    found = []
    for names in MODELS:
        costs = fit(known, names)
        found.append({"costs": costs, "fitted": asdict(error(costs, known)), "mixed": asdict(error(costs, unknown))})
    return found


def lines(report: dict[str, Any]) -> Iterable[str]:
    for k in report["kinds"]:
        what = "prefill" if k["prefill"] else "decode"
        rest = f"planning {k['planning_ms']:6.3f} ms, {k['tokens_per_s']:8.0f} tokens/s"
        yield f"{k['phase']:18} {what:8}{k['steps']:5} steps, median {k['ms']:8.3f} ms, {rest}"
    for f in report["fits"]:
        yield ", ".join(f"{name} {cost:.4g}" for name, cost in f["costs"].items())
        for name in ("fitted", _MIXED):
            e = Error(**f[name])
            yield (
                f"  {name}: {e.steps} steps, error of one: median {e.median:.1%}, p90 {e.p90:.1%}; "
                f"modelled / measured time of all: {e.total:.3f}"
            )
