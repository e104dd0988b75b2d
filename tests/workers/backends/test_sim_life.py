"""The modelled engine: aborts, deaths and stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from rsm.workers.backends.base import Chunk, EngineDied, EngineError, Job, Outcome
from rsm.workers.backends.sim.backend import SimBackend
from rsm.workers.backends.sim.engine import SimConfig, SimTimes
from tests.support.chunks import Heard

FAST = SimConfig(times=SimTimes(step_s=0.002, prefill_token_s=0, decode_seq_s=0, context_token_s=0))
CHAT = {"messages": [{"role": "user", "content": "Explain quantum computing"}], "max_tokens": 6}


def nothing(_: Chunk) -> None:
    """For jobs that do not stream."""


def job(body: dict[str, Any] | None = None, kind: str = "generate", *, key: str = "c/1", **more: Any) -> Job:
    body = {"prompt": "Explain quantum computing", "max_tokens": 8} if body is None else body
    return Job(key=key, call_id="c", session="s", kind=kind, body=body, **more)


@pytest_asyncio.fixture
async def sim() -> AsyncIterator[SimBackend]:
    backend = SimBackend(FAST)
    await backend.start()
    yield backend
    await backend.stop(0)


async def test_abort_keeps_the_partial_text(sim: SimBackend) -> None:
    body = {"prompt": "Explain quantum computing", "max_tokens": 5000}
    chunks = Heard()
    task = asyncio.create_task(sim.run(job(body, stream=True), chunks.hear))
    await chunks.first(3)
    sim.abort("c/1")
    out = await asyncio.wait_for(task, 1)
    assert out.finish_reason == "abort"
    assert out.token_ids == [i for p in chunks for i in p.token_ids]
    assert out.text == "".join(p.text for p in chunks)
    assert out.completion_tokens == len(out.token_ids) >= 3
    assert sim.load().kv_usage == 0
    sim.abort("unknown")


async def test_nothing_is_published_after_an_abort() -> None:
    # The steps are so short that the next one is due before the aborted `run` continues.
    backend = SimBackend(SimConfig(times=SimTimes(step_s=1e-9)))
    await backend.start()
    chunks = Heard()
    task = asyncio.create_task(backend.run(job({"prompt": "x", "max_tokens": 5000}, stream=True), chunks.hear))
    await chunks.first(3)
    backend.abort("c/1")
    count = len(chunks)
    out = await task
    await backend.stop(0)
    assert out.finish_reason == "abort"
    assert out.completion_tokens == len(chunks) == count


async def test_an_abort_at_the_last_token_is_too_late(sim: SimBackend) -> None:
    chunks: list[Chunk] = []

    def emit(chunk: Chunk) -> None:
        chunks.append(chunk)
        if len(chunks) == 8:
            sim.abort("c/1")

    assert (await sim.run(job(stream=True), emit)).finish_reason == "length"


async def test_a_cancelled_run_leaves_the_engine(sim: SimBackend) -> None:
    chunks = Heard()
    body = {"prompt": "x", "max_tokens": 5000}
    task = asyncio.create_task(sim.run(job(body, stream=True), chunks.hear))
    await chunks.first(1)
    assert sim.load().kv_usage > 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sim.load().kv_usage == 0


async def test_an_error_of_emit_ends_only_that_call(sim: SimBackend) -> None:
    def broken(_: Chunk) -> None:
        raise KeyError("emit")

    bad, good = await asyncio.gather(
        sim.run(job(stream=True, key="bad"), broken), sim.run(job(key="good"), nothing), return_exceptions=True
    )
    assert isinstance(bad, KeyError)
    assert isinstance(good, Outcome)


async def test_a_key_runs_once_at_a_time(sim: SimBackend) -> None:
    first = asyncio.create_task(sim.run(job(), nothing))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="is already running"):
        await sim.run(job(), nothing)
    assert (await first).completion_tokens == 8


async def test_kill_ends_all_calls_with_the_reason(sim: SimBackend) -> None:
    body = {"prompt": "x", "max_tokens": 5000}
    runs = [asyncio.create_task(sim.run(job(body, key=str(n)), nothing)) for n in range(3)]
    death = asyncio.create_task(sim.died())
    await asyncio.sleep(0.02)
    assert not death.done()
    sim.kill("GPU on fire")
    for run in runs:
        with pytest.raises(EngineDied, match="GPU on fire"):
            await run
    assert await asyncio.wait_for(death, 1) == "GPU on fire"
    with pytest.raises(EngineDied, match="GPU on fire"):
        await sim.run(job(), nothing)


@pytest.mark.parametrize("times", [FAST.times, SimTimes.zero()])
@pytest.mark.parametrize("kind", ["generate", "chat.completions"])
async def test_a_fatal_prompt_kills_the_engine(times: SimTimes, kind: str) -> None:
    backend = SimBackend(SimConfig(times=times, die_on="quantum", max_num_seqs=2))
    await backend.start()
    chunks = Heard()
    if not backend.config.instant:
        beside = asyncio.create_task(backend.run(job({"prompt": "x", "max_tokens": 5000}, stream=True), chunks.hear))
        await chunks.first(1)
    with pytest.raises(EngineDied, match="die_on"):
        await backend.run(job(None if kind == "generate" else CHAT, kind, key="fatal"), nothing)
    if not backend.config.instant:
        with pytest.raises(EngineDied, match="die_on"):
            await beside
    assert "die_on" in await asyncio.wait_for(backend.died(), 1)
    await backend.stop(0)


async def test_stop_lets_calls_finish_within_the_grace(sim: SimBackend) -> None:
    short = asyncio.create_task(sim.run(job(key="short"), nothing))
    long = asyncio.create_task(sim.run(job({"prompt": "x", "max_tokens": 100_000}, key="long"), nothing))
    await asyncio.sleep(0)
    await sim.stop(0.2)
    assert (await short).completion_tokens == 8
    with pytest.raises(EngineDied, match="stopped"):
        await long
    with pytest.raises(EngineDied, match="stopped"):
        await sim.run(job(), nothing)


async def test_an_engine_that_was_not_started_runs_nothing() -> None:
    with pytest.raises(EngineDied, match="not started"):
        await SimBackend().run(job(), nothing)
