"""One run of one system: the programs played through it, their results, and the cost in CPU time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil

from bench.programs.live.replay import Answer, Player, Serve
from bench.programs.live.samples import TIMES
from bench.programs.metrics import Figures, ProgramRun
from bench.programs.peers.systems import Running
from rsm.simulation.workload.programs import ProgramSpec

# Ids that texts consist of: all that a modelled engine prints as words.
VOCABULARY = range(3, 32_000)
_PINGS, _PING_TOKENS = 30, 32
_TICK_S = 0.02


@dataclass(frozen=True, slots=True)
class Cost:
    """The machine's resources that a run used: average cores in use, and the longest delay of a timer in the producer.

    Attributes:
        between: cores of the processes between producer and engines.
        machine: cores of all processes on the machine, including those of others.
    """

    producer: float
    between: float
    servers: float
    machine: float
    late_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """The result of a run. `failed`: calls without an answer; their programs count as unfinished."""

    figures: Figures
    failed: int
    wall_s: float
    cost: Cost


@dataclass(slots=True)
class _Tally:
    """Counts failed calls and answers them with a substitute, so that the rest of the run is not lost."""

    serve: Serve
    failed: dict[str, int] = field(default_factory=dict)
    first: str = ""

    async def __call__(self, program: str, prompt: list[int], tokens: int) -> Answer:
        try:
            return await self.serve(program, prompt, tokens)
        except Exception as e:
            self.failed[program] = self.failed.get(program, 0) + 1
            self.first = self.first or f"{type(e).__name__}: {e}"
            return Answer([VOCABULARY[0]] * tokens, 0, 0.0)


async def play(system: Running, servers: Sequence[int], programs: Sequence[ProgramSpec]) -> Run:
    """Plays programs through a system.

    Args:
        servers: pids of the engines' servers.
    """
    tally = _Tally(system.serve)
    meter = _Meter([os.getpid()], system.pids, servers)
    late = asyncio.create_task(_longest_delay())
    played = await Player(tally, VOCABULARY).play(programs)
    late.cancel()
    cost = meter.read(await late)
    for program in played:
        if program.spec.id in tally.failed:
            program.ended_s = None
            program.calls.clear()
    runs = [ProgramRun.of(program, TIMES, meter.wall_s) for program in played]
    if tally.first:
        print(f"    {sum(tally.failed.values())} calls failed; the first: {tally.first}", flush=True)
    return Run(Figures.of(runs), sum(tally.failed.values()), meter.wall_s, cost)


async def _longest_delay() -> float:
    """Runs a timer until it is cancelled; returns the longest delay of the timer in seconds."""
    worst = 0.0
    try:
        while True:
            due = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            worst = max(worst, time.perf_counter() - due)
    except asyncio.CancelledError:
        return worst


class _Meter:
    """Measures the CPU time of groups of processes since its creation."""

    def __init__(self, *groups: Iterable[int]) -> None:
        self._groups = [[psutil.Process(pid) for pid in group] for group in groups]
        self._began = time.perf_counter()
        self._before = self._used()

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._began

    def read(self, late_s: float) -> Cost:
        wall = self.wall_s
        after = self._used()
        producer, between, servers, machine = (after[n] - before for n, before in enumerate(self._before))
        return Cost(producer / wall, between / wall, servers / wall, machine / wall, late_s)

    def _used(self) -> list[float]:
        """Returns the CPU seconds of each group, and of the machine."""
        times = [sum(sum(p.cpu_times()[:2]) for p in group) for group in self._groups]
        machine = psutil.cpu_times()
        return [*times, sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)]


async def round_trip_ms(serve: Serve, run: int) -> float:
    """Returns the median time of sequential one-token calls, in milliseconds."""
    times = []
    for n in range(_PINGS):
        prompt = [VOCABULARY[(run * 7919 + n * 31 + i) % len(VOCABULARY)] for i in range(_PING_TOKENS)]
        began = time.perf_counter()
        await serve(f"ping-{run}-{n}", prompt, 1)
        times.append(time.perf_counter() - began)
    return median(times) * 1000


def as_dict(run: Run) -> dict[str, Any]:
    cost = {name: round(getattr(run.cost, name), 3) for name in Cost.__slots__}
    return {"figures": run.figures.as_dict(), "failed": run.failed, "wall_s": round(run.wall_s, 2), "cost": cost}
