"""Measures the scheduler plug-in's share of a step, with the real Scheduler class of the vLLM on the import path.

    python -m bench.vllm.scheduler_share [--calls 256] [--steps 400] [--name scheduler_share]

The model runner is a stub made of dictionaries and is not measured. The duration of a step was measured on a GPU
(bench/results/h200-steps.json). Two loads:

- quiet: all calls decode, and none starts or ends;
- busy: one call ends in each step, every fourth program is short and new, and a queue waits, so calls are preempted.

vLLM's own scheduler and the one with the plug-in take turns in one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from statistics import fmean, median, quantiles
from time import thread_time
from typing import Any

from bench.report.machine import here
from bench.report.page import RESULTS, Report, Target, publish, targets_table
from bench.report.table import table_line
from bench.vllm import miniature as mini
from bench.vllm.miniature import Call, Engine
from rsm.workers.scheduling.program import LEVELS
from rsm.workers.scheduling.vllm_plugin import make_scheduler

_TURN = 20
_STEPS = RESULTS / "h200-steps.json"
_AIM = 0.02  # of a step
_BOUNDS = (0, 1_000, 4_000, 16_000, 64_000)


@dataclass(slots=True)
class Timed:
    """An engine whose steps are timed.

    Attributes:
        schedule: seconds of each call of `schedule`.
        own: seconds of the plug-in in each of them.
    """

    engine: Engine
    schedule: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    inner: float = 0.0

    def watch(self) -> None:
        scheduler = self.engine.scheduler
        base = vllm_class(scheduler)
        whole, vllms = scheduler.schedule, base.schedule

        def inner(*args: Any, **kwargs: Any) -> Any:
            began = thread_time()
            output = vllms(scheduler, *args, **kwargs)
            self.inner = thread_time() - began
            return output

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = thread_time()
            output = whole(*args, **kwargs)
            self.schedule.append(thread_time() - began)
            self.own.append(self.schedule[-1] - self.inner)
            return output

        # Both engines share the class, so each installs its own method just before its turn.
        self.before = lambda: setattr(base, "schedule", lambda _, *a, **k: inner(*a, **k))
        self.after = lambda: setattr(base, "schedule", vllms)
        scheduler.schedule = timed

    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None

    def turn(self, steps: int, each: Callable[[Engine], None]) -> None:
        self.before()
        for _ in range(steps):
            each(self.engine)
            self.engine.step()
        self.after()


def vllm_class(scheduler: Any) -> Any:
    """Returns vLLM's class that defines `schedule`."""
    return next(c for c in type(scheduler).__mro__ if "schedule" in vars(c) and c.__module__.startswith("vllm."))


class LightRunner:
    """Returns a token for every request without prompt left to compute; checks nothing."""

    def __init__(self, scheduler: Any) -> None:
        self._requests = scheduler.requests

    def execute(self, output: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        ids = list(output.num_scheduled_tokens)
        sampled = [[] if self._requests[i].is_prefill_chunk else [7] for i in ids]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )


def fill(coming: Iterator[Call], full: int, engine: Engine) -> None:
    """Adds calls until the engine has `full` of them."""
    for _ in range(full - len(engine.scheduler.requests)):
        engine.add(next(coming))


def calls(dice: random.Random, longest: int, all_long: bool) -> Iterator[Call]:
    for number in count():
        level = dice.randrange(len(_BOUNDS))
        program = {"program_id": f"p{number}", "program_service": _BOUNDS[level]}
        prompt = [dice.randrange(1000) for _ in range(dice.randint(64, 512))]
        size = longest if all_long else dice.randint(1, longest)
        yield Call(f"c{number}", prompt, size, priority=LEVELS + level, program=program)


def measure(load: str, asynchronous: bool, slots: int, steps: int) -> dict[str, Any]:
    pairs: list[tuple[Timed, Callable[[Engine], None]]] = []
    for make in (mini.stock, make_scheduler):
        engine = mini.make_engine(make, asynchronous=asynchronous, slots=slots, blocks=400_000, step_tokens=8192)
        engine.runner = LightRunner(engine.scheduler)  # type: ignore[assignment]
        dice = random.Random(1)
        quiet = load == "quiet"
        each: Callable[[Engine], None] = partial(
            fill, calls(dice, 7000 if quiet else 2 * slots, quiet), slots + (0 if quiet else slots // 8)
        )
        timed = Timed(engine)
        for _ in range(100):
            each(engine)
            engine.step()
        timed.watch()
        pairs.append((timed, each))
    gc.collect()
    gc.freeze()
    for _ in range(steps // _TURN):
        for timed, each in pairs:
            timed.turn(_TURN, each)
    (stock, _), (plas, _) = pairs
    return {
        "load": load,
        "mode": "async" if asynchronous else "sync",
        "running": len(plas.engine.scheduler.running),
        "stock_ms": 1000 * median(stock.schedule),
        "plas_ms": 1000 * median(plas.schedule),
        "own_ms": 1000 * median(plas.own),
        "own_mean_ms": 1000 * fmean(plas.own),
        "own_p99_ms": 1000 * quantiles(plas.own, n=100)[98],
        "steps": len(plas.own),
    }


# -- comparison with the duration of a step


def decode_ms(measured: Mapping[str, Any], calls: int) -> dict[str, float]:
    """Returns the ms of steps in which `calls` calls decode and nothing else is done, by context length."""
    name = f"decode {calls} x "
    found = [kind for kind in measured["kinds"] if kind["phase"].startswith(name) and not kind["prefill"]]
    return {kind["phase"].removeprefix(name): kind["ms"] for kind in found}


def cost_ms(row: Mapping[str, Any]) -> float:
    """Returns what the plug-in adds to a step: the difference in planning, but at least the time inside the plug-in."""
    return max(float(row["plas_ms"] - row["stock_ms"]), float(row["own_mean_ms"]))


def section(rows: Sequence[Mapping[str, Any]], steps: Mapping[str, float], gpu: Mapping[str, Any]) -> list[str]:
    """Returns the tables of the page.

    Args:
        steps: the result of `decode_ms`.
        gpu: what the steps were measured on.
    """
    columns = (
        "Load",
        "Mode",
        "Running",
        "Steps",
        "vLLM, ms",
        "with the plug-in, ms",
        "plug-in alone: median, mean, p99, ms",
    )
    shares = [f"share of a step, contexts of {context}" for context in steps]
    head = (*columns, *shares)
    lines = [
        "CPU time to plan a step (medians), by vLLM's own scheduler and with the plug-in, compared with decode steps "
        f"measured with vLLM {gpu['vllm']} on an {gpu['device']} ({gpu['model']}): "
        + ", ".join(f"{ms:.1f} ms with contexts of {context}" for context, ms in steps.items())
        + ". Busy: one call ends in each step, every fourth program is short and new, and calls are preempted.",
        "",
        table_line(head),
        table_line(["---", "---", *["---:"] * (len(head) - 2)]),
        *(_line(row, steps) for row in rows),
        "",
    ]
    worst = max(map(cost_ms, rows)) / min(steps.values())
    what = "the plug-in's share of the shortest of these steps, all calls running"
    return [*lines, *targets_table([Target(what, f"≤ {_AIM:.0%}", f"{worst:.1%}", worst <= _AIM)])]


def _line(row: Mapping[str, Any], steps: Mapping[str, float]) -> str:
    own = ", ".join(f"{row[name]:.3f}" for name in ("own_ms", "own_mean_ms", "own_p99_ms"))
    shares = (f"{cost_ms(row) / ms:.2%}" for ms in steps.values())
    about = (row["load"], row["mode"], str(row["running"]), str(row["steps"]))
    return table_line((*about, f"{row['stock_ms']:.3f}", f"{row['plas_ms']:.3f}", own, *shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--name", default="scheduler_share", help="Name of the result files in bench/results.")
    args = parser.parse_args()
    measured = json.loads(_STEPS.read_text(encoding="utf-8"))
    steps = decode_ms(measured, args.calls)
    if not steps:
        parser.error(f"{_STEPS.name} has no decode steps of {args.calls} calls; use a --calls that was measured")
    version = mini.prepare()
    rows = [
        measure(load, asynchronous, args.calls, args.steps)
        for load in ("quiet", "busy")
        for asynchronous in (False, True)
    ]
    found = section(rows, steps, measured["engine"])
    about = here(vLLM=f"{version}, its scheduler alone")
    command = "python -m bench.vllm.scheduler_share"
    publish(
        Report("The scheduler's share of a step", about, found, {"rows": rows, "steps_ms": steps}, command), args.name
    )


if __name__ == "__main__":
    main()
