"""Calibration: measures the step costs of real vLLM on this machine for the modelled engine.

Every step of the engine is logged (`workers/backends/vllm/steps.py`) while it runs

1. prompts of many lengths, one at a time, for the cost of a prompt,
2. batches that decode, of few and many calls, with short and long contexts, for the cost of a step, a call and a
   context,
3. calls of all lengths that arrive at random. The fit does not use these steps; they test it.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from rsm.broker.errors import InvalidRequest
from rsm.broker.settings import Settings
from rsm.simulation.calibration.step_costs import Error, Timed, durations, error, fit
from rsm.workers.backends.base import Backend, Job
from rsm.workers.backends.factory import create_backend
from rsm.workers.backends.sim.config import SimTimes
from rsm.workers.backends.vllm import steps as vllm_steps
from rsm.workers.config import EngineConfig

_COSTS = tuple(f.name for f in fields(SimTimes))
_WARM_UP = 4  # rounds
_PREFILLS, _DECODE_STEPS = 4, 40
_IDS = range(300, 600)  # ordinary tokens of any vocabulary


@dataclass(frozen=True, slots=True)
class Calibration:
    """The result: `times` for SimTimes, `engine` for SimConfig, and the errors on the fitted and the other steps."""

    times: dict[str, float]
    engine: dict[str, int]
    fitted: Error
    held_out: Error
    measured: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """The content of the file for `--times-file` and the engine argument `times_file`."""
        return asdict(self)


def calibrate(config: EngineConfig, settings: Settings, seconds: float = 20.0) -> Calibration:
    """Starts an engine, measures it, and stops it.

    Args:
        seconds: how long calls arrive at random. The rest takes about three times as long.

    Raises:
        InvalidRequest: it is not a vLLM engine, or has a custom scheduler.
        EngineDied: vLLM does not start.
    """
    if config.backend != "vllm" or "scheduler_cls" in config.engine_args:
        raise InvalidRequest("Only backend vllm with vLLM's own scheduler can be calibrated; leave scheduler_cls out.")
    with tempfile.TemporaryDirectory(prefix="rsm-calibrate-") as folder:
        return asyncio.run(_calibrate(config, Path(folder) / "steps.jsonl", seconds, settings))


async def _calibrate(config: EngineConfig, file: Path, seconds: float, settings: Settings) -> Calibration:
    logged = {"scheduler_cls": vllm_steps.FACTORY, "additional_config": vllm_steps.logged(file)}
    watched = config.model_copy(update={"engine_args": config.engine_args | logged})
    backend = create_backend(watched, settings)
    facts = await backend.start()
    try:
        sweep = Sweep(backend, file, vllm_steps.described(file))
        await sweep.warm_up()
        known = [*await sweep.prefill(), *await sweep.decode()]
        unknown = await sweep.mixed(seconds)
    finally:
        await backend.stop(0)
    measured = {"model": facts.model, "version": facts.version, "scheduler": "vLLM's own"}
    return solve(known, unknown, sweep.engine, measured)


def solve(
    known: Sequence[Timed], unknown: Sequence[Timed], engine: dict[str, int], measured: dict[str, Any]
) -> Calibration:
    """Fits the costs to the known steps; returns them with their errors on known and unknown steps."""
    times = fit(known, _COSTS)
    return Calibration(times, engine, error(times, known), error(times, unknown), measured)


class Sweep:
    """Runs calls of random tokens on a backend whose steps are logged."""

    def __init__(self, backend: Backend, file: Path, engine: dict[str, int], seed: int = 1) -> None:
        self.engine = engine
        self._backend = backend
        self._file = file
        self._random = Random(seed)  # noqa: S311
        self._calls = count(1)
        self._read = 0

    async def warm_up(self) -> None:
        """Triggers compilations and allocations of the first use."""
        for _ in range(_WARM_UP):
            calls = min(16, self.engine["max_num_seqs"])
            await self._together([(min(200, self.longest // 2), 20)] * calls)
        await self._steps()

    async def prefill(self) -> list[Timed]:
        """Runs prompts of lengths from 16 up, each twice as long as the last."""
        for prompt in _doubling(16, self.longest - 2):
            for _ in range(_PREFILLS):
                await self._together([(prompt, 2)])
        return await self._steps()

    async def decode(self) -> list[Timed]:
        """Runs batches of 1, 4, 16, … calls with contexts of 32, 128, 512, … as far as they fit."""
        slots, kv = self.engine["max_num_seqs"], self.engine["kv_tokens"]
        for context in _doubling(32, self.longest - 2 * _DECODE_STEPS, 4):
            for batch in _doubling(1, slots, 4):
                # The first call decodes while the last prompt is still computed, so answers must be long enough to
                # overlap.
                more = _DECODE_STEPS + context * batch // self.engine["max_num_batched_tokens"]
                if batch * (context + more) <= kv and context + more <= self.longest:
                    await self._together([(context, more)] * batch)
        return await self._steps()

    async def mixed(self, seconds: float) -> list[Timed]:
        """Runs calls of all lengths that arrive at random, so that about a third of the slots is taken."""
        longest = min(self.longest // 2, self.engine["kv_tokens"] // 8)
        loop = asyncio.get_running_loop()
        until, tasks = loop.time() + seconds, set[asyncio.Task[None]]()
        while loop.time() < until:
            if len(tasks) < max(2, self.engine["max_num_seqs"] // 3):
                prompt = min(8 + int(self._random.lognormvariate(5.0, 1.2)), longest)
                task = asyncio.create_task(self._call(prompt, 2 + int(self._random.expovariate(1 / 60))))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(self._random.expovariate(50))
        await asyncio.gather(*tasks)
        return await self._steps()

    @property
    def longest(self) -> int:
        """The most tokens of a call."""
        return min(self.engine["max_model_len"], self.engine["kv_tokens"])

    async def _together(self, calls: Sequence[tuple[int, int]]) -> None:
        await asyncio.gather(*(self._call(prompt, output) for prompt, output in calls))

    async def _call(self, prompt: int, output: int) -> None:
        name = f"calibrate-{next(self._calls)}"
        ids = self._random.choices(_IDS, k=prompt)
        body = {"prompt_token_ids": ids, "max_tokens": output, "ignore_eos": True, "temperature": 0.0}
        await self._backend.run(Job(name, name, name, "generate", body), lambda chunk: None)

    async def _steps(self) -> list[Timed]:
        """The steps since the last call of this method."""
        await asyncio.sleep(3 * vllm_steps.EVERY_S)
        steps = list(vllm_steps.read(self._file))
        new, self._read = steps[self._read :], len(steps)
        return durations(new)


def _doubling(first: int, last: int, factor: int = 2) -> Iterator[int]:
    """Yields first, factor x first, … and last."""
    value = first
    while value < last:
        yield value
        value *= factor
    yield max(first, last)
