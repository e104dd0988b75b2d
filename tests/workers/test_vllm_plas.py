"""Real vLLM on the CPU with the scheduler plug-in: two slots, and a KV cache that is too small for two long calls."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from multiprocessing import resource_tracker
from typing import Any

import pytest
import pytest_asyncio

from rsm.broker.settings import Settings
from rsm.workers.backends.base import Chunk, Job, Outcome
from rsm.workers.backends.factory import create_backend
from rsm.workers.backends.vllm.backend import VllmBackend
from rsm.workers.config import EngineConfig
from tests.support.vllm.jobs import CITY, chat, generate, nothing, said, streamed

pytest.importorskip("vllm")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    # Warnings of vLLM and torch; all others stay errors.
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.distributed.reduce_op:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.vllm.entrypoints.openai.api_server:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
]

_SLOTS = 2
_ARGS = {"block-size": 32, "num-gpu-blocks-override": 36, "max-num-batched-tokens": 256}
_CONFIG = EngineConfig(
    engine_id="plas", max_num_seqs=_SLOTS, max_model_len=1024, engine_scheduler="plas", engine_args=_ARGS
)
_BOUNDS = (0, 1_000, 4_000, 16_000, 64_000)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm() -> AsyncIterator[VllmBackend]:
    resource_tracker.ensure_running()  # multiprocessing's helper, which outlives the engine that needs it
    backend = create_backend(_CONFIG, Settings())
    assert isinstance(backend, VllmBackend)
    await backend.start()
    yield backend
    await backend.stop(0)


def of_program(j: Job, name: str, level: int = 0, priority: int = 1) -> Job:
    """A job of a program whose service is at the lower bound of a level."""
    return replace(
        j, key=f"{name}/1", call_id=name, priority=priority, level=level, program=name, inherited=_BOUNDS[level]
    )


def long_call(name: str, tokens: int = 600, **more: Any) -> Job:
    return of_program(generate(prompt=f"A long story about {name}. " * 8, max_tokens=tokens, **more), name, level=4)


async def alone(vllm: VllmBackend, jobs: list[Job]) -> list[Outcome]:
    """Their outcomes when each runs alone."""
    return [await vllm.run(replace(j, key=f"{j.call_id}/alone"), nothing) for j in jobs]


async def test_a_short_program_takes_the_slot_of_a_long_one(vllm: VllmBackend) -> None:
    long = [long_call("one"), long_call("two")]
    short = [of_program(generate(max_tokens=5, stream=True), "brief"), of_program(chat(max_tokens=5), "chat")]
    expected = await alone(vllm, [*long, *short])
    running = [asyncio.create_task(vllm.run(j, nothing)) for j in long]
    await steps(vllm, 20)
    outcomes = []
    for j in short:
        outcomes.append(await vllm.run(j, nothing))
        assert not [task for task in running if task.done()], "it waited until a long one ended"
    outcomes = [*(await asyncio.gather(*running)), *outcomes]
    for got, wanted in zip(outcomes, expected, strict=True):
        assert (got.token_ids, got.text, got.finish_reason) == (wanted.token_ids, wanted.text, wanted.finish_reason)
    await nothing_left(vllm)


async def test_calls_of_equal_rank_do_not_preempt_each_other(vllm: VllmBackend) -> None:
    first = [asyncio.create_task(vllm.run(long_call(f"first{i}", 100), nothing)) for i in range(_SLOTS)]
    await steps(vllm, 10)
    await vllm.run(long_call("second", 2), nothing)
    assert any(task.done() for task in first)
    await asyncio.gather(*first)


async def test_a_call_that_has_used_up_its_level_is_preempted(vllm: VllmBackend) -> None:
    """All programs are new. 1,000 units are 500 tokens."""
    greedy = [of_program(generate(max_tokens=900), f"greedy{i}") for i in range(_SLOTS)]
    running = [asyncio.create_task(vllm.run(j, nothing)) for j in greedy]
    await steps(vllm, 600)
    await vllm.run(of_program(generate(max_tokens=5), "late"), nothing)
    assert not any(task.done() for task in running)
    assert [o.completion_tokens for o in await asyncio.gather(*running)] == [900, 900]


async def test_a_preempted_call_under_a_grammar_resumes(vllm: VllmBackend) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    written = [of_program(chat(response_format=form, max_tokens=300, seed=i), f"json{i}", 4) for i in range(_SLOTS)]
    expected = await alone(vllm, written)
    running = [asyncio.create_task(vllm.run(j, nothing)) for j in written]
    for i in range(4):
        await steps(vllm, 3)
        await vllm.run(of_program(generate(max_tokens=3), f"between{i}"), nothing)
    assert [o.text for o in await asyncio.gather(*running)] == [o.text for o in expected]


async def jostle(vllm: VllmBackend, jobs: list[Job], expected: list[Outcome], dice: random.Random) -> None:
    """Runs the jobs at random times and aborts some of them."""
    doomed = {j.call_id for j in dice.sample(jobs, 8)}

    async def run(j: Job) -> tuple[Outcome, list[Chunk]]:
        await asyncio.sleep(dice.random() * 1.5)
        if j.call_id in doomed:
            asyncio.get_running_loop().call_later(dice.random() * 0.5, vllm.abort, j.key)
        return await streamed(vllm, j)

    async with asyncio.timeout(120):
        ends = await asyncio.gather(*map(run, jobs))
    for j, (got, chunks), whole in zip(jobs, ends, expected, strict=True):
        assert got.token_ids == whole.token_ids[: len(got.token_ids)], j.call_id
        assert got.finish_reason == ("abort" if len(got.token_ids) < len(whole.token_ids) else whole.finish_reason)
        assert got.finish_reason != "abort" or j.call_id in doomed
        assert not j.stream or got.finish_reason == "abort" or said(chunks) == whole.text


async def test_random_load_does_not_change_the_tokens(vllm: VllmBackend) -> None:
    """Random programs, priorities, lengths and aborts, with too few slots and blocks."""
    dice = random.Random(5)
    jobs = [
        of_program(
            generate(prompt=f"Number {i}. " * dice.randint(1, 90), max_tokens=dice.randint(1, 120), stream=i % 2 == 0),
            f"r{i}",
            dice.randrange(5),
            dice.choice([1, 1, 2]),
        )
        for i in range(30)
    ]
    expected = await alone(vllm, jobs)
    preempted = preemptions(vllm)
    for turn in range(5):  # several times, because fewer calls overlap on a slow machine
        await jostle(vllm, [replace(j, key=f"{j.call_id}/{turn}") for j in jobs], expected, dice)
        if sum(preempted) > 5:
            break
    assert sum(preempted) > 5, "too few preemptions for a proof"
    await nothing_left(vllm)


def preemptions(vllm: VllmBackend) -> list[int]:
    """The number of requests that each step preempts from now on, from vLLM's statistics."""
    found: list[int] = []
    record = vllm._meter.record

    def listen(scheduler_stats: Any, iteration_stats: Any, *more: Any, **named: Any) -> None:
        found.append(iteration_stats.num_preempted_reqs if iteration_stats is not None else 0)
        record(scheduler_stats, iteration_stats, *more, **named)

    vllm._meter.record = listen  # type: ignore[method-assign]
    return found


async def steps(vllm: VllmBackend, count: int) -> None:
    """Waits until the engine has made `count` more steps."""
    until = (vllm.progress() or 0) + count
    for _ in range(60_000):
        if (vllm.progress() or 0) >= until:
            return
        await asyncio.sleep(0.001)
    raise AssertionError("the engine hangs")


async def nothing_left(vllm: VllmBackend) -> None:
    assert vllm._engine is not None
    processor = vllm._engine.llm.output_processor
    for _ in range(250):
        if not processor.request_states and not processor.parent_requests:
            break
        await asyncio.sleep(0.02)
    assert not processor.request_states
    assert not processor.parent_requests
    assert not vllm._runs
