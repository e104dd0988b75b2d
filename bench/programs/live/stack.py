"""Runs the small case in real time: engines behind the real broker, a scaled-down mixed workload, open loop.

`bench/programs/live/small.py` defines the engines and programs, and writes the table. The setup is as in production:
Redis, a router process, a worker process for each engine, and a producer.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.programs.live.replay import Answer, Player
from rsm.broker import AsyncClient, Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.models import EngineState
from rsm.broker.views.monitor import Monitor
from rsm.simulation.results import ProgramTimes
from rsm.simulation.workload.programs import ProgramSpec
from rsm.workers.config import EngineConfig
from rsm.workers.environment import CONFIG_VARIABLE

_READY_S, _LEAVE_S = 240.0, 30.0
# Token ids that are ordinary words for the tiny model and for any other.
VOCABULARY = range(300, 600)


@dataclass(frozen=True, slots=True)
class Stack:
    """What to start: engines, and the settings (RSM_*) of all processes beyond those of every run."""

    engines: Sequence[EngineConfig]
    settings: Mapping[str, Any]


@contextmanager
def up(stack: Stack, log: Path) -> Iterator[Settings]:
    """Runs Redis, a router and workers until the end of the block; yields the settings to reach them."""
    with ExitStack() as stack_of, log.open("ab") as output:
        server = stack_of.enter_context(EmbeddedRedis())
        settings = Settings(namespace=f"programs{new_id()}", **stack.settings).with_redis(server.url)
        env = {k: v for k, v in os.environ.items() if not k.startswith("RSM_")} | settings.environment()
        environments = [("rsm.router", env)]
        environments += [("rsm.workers", env | {CONFIG_VARIABLE: e.as_json()}) for e in stack.engines]
        for module, variables in environments:
            command = [sys.executable, "-P", "-m", module]
            process = subprocess.Popen(command, env=variables, stdout=output, stderr=output)
            stack_of.callback(_end, process)
        _await_engines(Monitor(settings), [e.engine_id for e in stack.engines], log)
        yield settings


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_LEAVE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _await_engines(monitor: Monitor, names: Sequence[str], log: Path) -> None:
    until = time.monotonic() + _READY_S
    while True:
        known = set(monitor.engine_ids())
        if all(name in known and monitor.engine(name)["state"] == EngineState.READY for name in names):
            return
        if time.monotonic() > until:
            raise TimeoutError(f"Not all engines were READY after {_READY_S:g} s. See the log: {log}")
        time.sleep(0.1)


async def drive(settings: Settings, programs: Sequence[ProgramSpec]) -> list[ProgramTimes]:
    """Plays programs through the broker."""
    async with AsyncClient(settings=settings) as client:

        async def serve(session: str, prompt: list[int], tokens: int) -> Answer:
            call = await client.submit(
                prompt, session=session, prompt_tokens=len(prompt), max_tokens=tokens, ignore_eos=True, temperature=0
            )
            result = await call.result()
            return Answer(result.token_ids, result.cached_tokens, result.waiting_time)

        return await Player(serve, VOCABULARY).play(programs)


def run(stack: Stack, programs: Sequence[ProgramSpec], warm: Sequence[ProgramSpec] = ()) -> list[ProgramTimes]:
    """Starts a stack, warms it up with other programs, plays these, and stops it."""
    with tempfile.TemporaryDirectory(prefix="rsm-programs-") as folder, up(stack, Path(folder) / "log") as settings:
        if warm:
            asyncio.run(drive(settings, warm))
        return asyncio.run(drive(settings, programs))
