"""Plays programs in real time, open loop: each program arrives at its time, whether or not earlier ones have ended.

The texts of a program are token ids. A text's ids depend only on its number; an answer's ids are those from the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from time import perf_counter
from typing import NamedTuple

from rsm.simulation.results import CallTimes, ProgramTimes
from rsm.simulation.workload.programs import ProgramSpec, Segment


class Answer(NamedTuple):
    """An engine's answer. `waited_s`: from the call's submission until it was first served."""

    ids: Sequence[int]
    cached: int
    waited_s: float


# Runs one call: program id, prompt tokens, number of output tokens.
Serve = Callable[[str, list[int], int], Awaitable[Answer]]


def scaled(spec: ProgramSpec, divisor: int, max_calls: int) -> ProgramSpec:
    """Returns the program with all lengths divided, and only its first calls."""

    def shorter(segment: Segment) -> Segment:
        return Segment(segment.text, max(1, segment.tokens // divisor))

    calls = tuple(
        replace(c, prompt=tuple(map(shorter, c.prompt)), output_tokens=max(1, c.output_tokens // divisor))
        for c in spec.calls[:max_calls]
    )
    return replace(spec, calls=calls)


@dataclass(slots=True)
class Player:
    """Plays programs through `serve`; texts consist of ids from `vocabulary`."""

    serve: Serve
    vocabulary: Sequence[int]
    _texts: dict[int, list[int]] = field(default_factory=dict)

    async def play(self, programs: Sequence[ProgramSpec]) -> list[ProgramTimes]:
        """Plays all programs to their ends; returns their times in seconds from the start."""
        began = perf_counter()
        return list(await asyncio.gather(*(self._program(p, began) for p in programs)))

    async def _program(self, spec: ProgramSpec, began: float) -> ProgramTimes:
        await _until(began + spec.arrival_s)
        tasks: list[asyncio.Task[CallTimes]] = []
        async with asyncio.TaskGroup() as group:
            for index, call in enumerate(spec.calls):
                before = [tasks[n] for n in call.after]
                tasks.append(group.create_task(self._call(spec, index, before, began)))
        calls = [t.result() for t in tasks]
        return ProgramTimes(spec, calls, max(c.reported_s or 0.0 for c in calls))

    async def _call(
        self, spec: ProgramSpec, index: int, before: list[asyncio.Task[CallTimes]], began: float
    ) -> CallTimes:
        call = spec.calls[index]
        ends = [(await task).reported_s or 0.0 for task in before]
        ready = max(ends, default=spec.arrival_s) + call.delay_s
        await _until(began + ready)
        prompt = [i for s in call.prompt for i in self._ids(s)]
        answer = await self.serve(spec.id, prompt, call.output_tokens)
        if call.answer:
            self._texts[call.answer] = list(answer.ids)
        times = CallTimes(spec.id, index, spec.id, len(prompt), len(answer.ids), ready)
        times.started_s, times.reported_s = ready + answer.waited_s, perf_counter() - began
        times.cached_tokens = answer.cached
        return times

    def _ids(self, segment: Segment) -> list[int]:
        known = self._texts.get(segment.text, [])
        if len(known) < segment.tokens:  # seeded by its number, so a longer text starts with the shorter one
            known = Random(segment.text).choices(self.vocabulary, k=segment.tokens)
            self._texts[segment.text] = known
        return known[: segment.tokens]


async def _until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - perf_counter()))
