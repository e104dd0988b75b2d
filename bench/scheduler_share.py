"""How much of a step the scheduler plug-in takes, around the real Scheduler class of the vLLM on the import path.

    python -m bench.scheduler_share [--calls 256] [--steps 400]

Prints one JSON object. The model runner is made of dictionaries and is not measured; two loads:

- quiet: all calls decode, none comes or goes;
- busy: one ends in each step, a program in four is short and new, and a queue waits, so that calls are preempted.

vLLM's own scheduler and the one with the plug-in take turns, twenty steps each, in one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from statistics import median, quantiles
from time import thread_time
from typing import Any

from tests import vllm_miniature as mini
from tests.vllm_miniature import Call, Engine
from workers.vllm_program import LEVELS
from workers.vllm_scheduler import make_scheduler

_TURN = 20
_BOUNDS = (0, 1_000, 4_000, 16_000, 64_000)


@dataclass(slots=True)
class Timed:
    """An engine whose steps are timed.

    Attributes:
        schedule: seconds of each `schedule`.
        own: seconds of the plug-in's part of it.
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

        # The class is shared by the two engines, so each brings its own just before its turn.
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
    """The class of vLLM's that has `schedule`."""
    return next(c for c in type(scheduler).__mro__ if "schedule" in vars(c) and c.__module__.startswith("vllm."))


class LightRunner:
    """Says a token for every request that has no prompt left to compute; checks nothing."""

    def __init__(self, scheduler: Any) -> None:
        self._requests = scheduler.requests

    def execute(self, output: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        ids = list(output.num_scheduled_tokens)
        said = [[] if self._requests[i].is_prefill_chunk else [7] for i in ids]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=said,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )


def fill(coming: Iterator[Call], full: int, engine: Engine) -> None:
    """Adds calls until the engine has so many."""
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
        "own_p99_ms": 1000 * quantiles(plas.own, n=100)[98],
        "steps": len(plas.own),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    version = mini.prepare()
    rows = [
        measure(load, asynchronous, args.calls, args.steps)
        for load in ("quiet", "busy")
        for asynchronous in (False, True)
    ]
    print(json.dumps({"version": version, "rows": rows}))


if __name__ == "__main__":
    main()
