"""Real vLLM on the CPU with the tiny random model. One engine serves the whole module; the last test kills it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from multiprocessing import resource_tracker
from typing import Any

import psutil
import pytest
import pytest_asyncio

from rsm.broker.settings import Settings
from rsm.workers.backends.base import Chunk, EngineDied, Job
from rsm.workers.backends.factory import create_backend
from rsm.workers.backends.vllm.backend import VllmBackend
from rsm.workers.config import EngineConfig
from tests.support.vllm.jobs import (
    BAD_GENERATE,
    BAD_OPENAI,
    CITY,
    HOST,
    LONG,
    PROMPT,
    WEATHER,
    aborted,
    again,
    chat,
    completion,
    engine_core,
    finish_reasons,
    generate,
    nothing,
    rejected,
    said,
    streamed,
)
from tests.support.waiting import eventually

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

_STEP_TOKENS = 512
_CONFIG = EngineConfig(
    engine_id="e", max_num_seqs=8, engine_args={"block-size": 32, "max-num-batched-tokens": _STEP_TOKENS}
)
EACH_KIND = pytest.mark.parametrize("make", [generate, chat, completion])
OPENAI_KINDS = pytest.mark.parametrize("make", [chat, completion])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm() -> AsyncIterator[VllmBackend]:
    resource_tracker.ensure_running()  # multiprocessing's helper, which outlives the engine that needs it
    backend = create_backend(_CONFIG, Settings())
    assert isinstance(backend, VllmBackend)
    facts = await backend.start()
    assert (facts.model, facts.max_num_seqs) == ("tiny-llama", 8)
    assert facts.kv_tokens > 8192
    assert facts.version
    yield backend
    await backend.stop(0)
    assert not [p for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name()]


async def test_generate(vllm: VllmBackend) -> None:
    began = time.perf_counter()
    o = await vllm.run(generate(), nothing)
    assert (o.finish_reason, o.completion_tokens, len(o.token_ids)) == ("length", 24, 24)
    assert o.text
    assert o.prompt_tokens > 0
    assert o.ttft_ms is not None
    assert o.ttft_ms > 0
    assert o.running_ms is not None
    assert 0 < o.running_ms < (time.perf_counter() - began) * 1000


async def test_generate_streams_the_same_text(vllm: VllmBackend) -> None:
    whole = await vllm.run(generate(), nothing)
    outcome, chunks = await streamed(vllm, generate(stream=True))
    assert said(chunks) == outcome.text == whole.text
    assert [i for p in chunks for i in p.token_ids] == outcome.token_ids == whole.token_ids
    assert len(chunks) > 3


async def test_generate_takes_token_ids(vllm: VllmBackend) -> None:
    by_text = await vllm.run(generate(), nothing)
    assert vllm._engine is not None
    ids = await vllm._engine.tokenize(PROMPT)
    by_ids = await vllm.run(generate(prompt=None, prompt_token_ids=ids), nothing)
    assert by_ids.text == by_text.text
    assert by_ids.prompt_tokens == len(ids)


async def test_generate_under_a_grammar(vllm: VllmBackend) -> None:
    o = await vllm.run(generate(structured_outputs={"choice": ["yes", "no"]}), nothing)
    assert o.text in ("yes", "no")
    assert o.finish_reason == "stop"


@OPENAI_KINDS
async def test_a_response_is_whole_and_named(vllm: VllmBackend, make: Callable[..., Job]) -> None:
    o = await vllm.run(make(), nothing)
    assert o.response is not None
    assert o.response["model"] == "tiny-llama"
    assert o.response["id"].endswith("-c")
    assert o.response["usage"]["completion_tokens"] == o.completion_tokens == 24
    assert o.finish_reason == "length"
    assert o.text
    assert o.ttft_ms is not None
    assert o.running_ms is not None
    assert o.running_ms > 0


@OPENAI_KINDS
async def test_a_stream_has_the_text_of_the_whole_response(vllm: VllmBackend, make: Callable[..., Job]) -> None:
    whole = await vllm.run(make(), nothing)
    o, chunks = await streamed(vllm, make(stream=True, stream_options={"include_usage": True}))
    assert said(chunks) == o.text == whole.text
    assert (o.prompt_tokens, o.completion_tokens) == (whole.prompt_tokens, 24)
    assert finish_reasons(chunks) == ["length"]
    assert json.loads(chunks[-1].document)["usage"]["completion_tokens"] == 24
    assert len({(d["id"], d["created"]) for d in map(json.loads, (p.document for p in chunks))}) == 1


async def test_counts_come_from_the_engine_where_a_stream_has_none(vllm: VllmBackend) -> None:
    o, chunks = await streamed(vllm, chat(stream=True))
    assert all("usage" not in json.loads(p.document) for p in chunks)
    assert (o.completion_tokens, o.prompt_tokens) == (24, (await vllm.run(chat(), nothing)).prompt_tokens)


@OPENAI_KINDS
async def test_two_choices(vllm: VllmBackend, make: Callable[..., Job]) -> None:
    o = await vllm.run(make(n=2, temperature=1, seed=1), nothing)
    assert o.response is not None
    assert [c["index"] for c in o.response["choices"]] == [0, 1]
    assert o.completion_tokens == 48
    streaming, chunks = await streamed(vllm, make(n=2, temperature=1, seed=1, stream=True))
    assert finish_reasons(chunks) == ["length", "length"]
    assert streaming.text
    assert streaming.completion_tokens == 48


async def test_json_schema(vllm: VllmBackend) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    o = await vllm.run(chat(response_format=form, max_tokens=200), nothing)
    found = json.loads(o.text)
    assert set(found) == {"city", "people", "tags"}
    assert isinstance(found["city"], str)
    assert isinstance(found["people"], int)
    assert all(isinstance(tag, str) for tag in found["tags"])


async def test_a_forced_tool_call(vllm: VllmBackend) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    o = await vllm.run(chat(tools=[WEATHER], tool_choice=choice, max_tokens=200), nothing)
    assert o.response is not None
    call = o.response["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "get_weather"
    assert set(json.loads(call["arguments"])) == {"city", "days"}


async def test_logprobs(vllm: VllmBackend) -> None:
    o = await vllm.run(chat(logprobs=True, top_logprobs=2, max_tokens=3), nothing)
    assert o.response is not None
    assert [len(t["top_logprobs"]) for t in o.response["choices"][0]["logprobs"]["content"]] == [2, 2, 2]


async def test_a_repeated_prompt_is_cached(vllm: VllmBackend) -> None:
    prompt = "The router sends each call to the engine that has the cache. " * 20
    first = await vllm.run(generate(prompt=prompt), nothing)
    second = await vllm.run(generate(prompt=prompt), nothing)
    assert first.cached_tokens == 0
    assert second.cached_tokens >= second.prompt_tokens - 32
    assert second.text == first.text
    text = await vllm.run(completion(prompt=prompt), nothing)
    assert text.cached_tokens == second.cached_tokens
    assert vllm.load().tokens_per_s > 0


async def test_its_speed_is_measured_from_its_steps(vllm: VllmBackend) -> None:
    lengths = [200 + 60 * n for n in range(12)]
    for n in range(0, len(lengths), 4):
        prompts = [[10 + n + i] * tokens for i, tokens in enumerate(lengths[n : n + 4])]
        jobs = [generate(prompt=None, prompt_token_ids=p, max_tokens=30) for p in prompts]
        began = time.perf_counter()
        await asyncio.gather(*(vllm.run(replace(j, key=f"c/{n + i}"), nothing) for i, j in enumerate(jobs)))
        took = time.perf_counter() - began
    speed = vllm.load().speed
    assert speed is not None
    expected = sum(map(len, prompts)) * speed.token_s + 30 * (speed.step_s + 4 * speed.seq_s)
    assert took / 4 < expected < took * 4, (speed, took)


async def test_each_step_is_progress(vllm: VllmBackend) -> None:
    """Also a step that only computes a chunk of a prompt, and one for a call that does not stream."""
    before = vllm.progress()
    o = await vllm.run(
        generate(prompt="Another long prompt, of which nothing is cached. " * 100, max_tokens=1), nothing
    )
    prompt_chunks = o.prompt_tokens / _STEP_TOKENS
    assert prompt_chunks > 2
    assert vllm.progress() - before > prompt_chunks - 1
    before = vllm.progress()
    await vllm.run(chat(max_tokens=5), nothing)
    assert vllm.progress() - before >= 5


# -- aborts


@EACH_KIND
@pytest.mark.parametrize("stream", [False, True])
async def test_an_abort_keeps_the_partial_text(vllm: VllmBackend, make: Callable[..., Job], stream: bool) -> None:
    o, chunks = await aborted(vllm, make(**LONG, stream=stream))
    assert o.finish_reason == "abort"
    assert o.text
    assert 0 < o.completion_tokens < 5000
    assert said(chunks) == (o.text if stream else "")
    await no_request_left(vllm)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_abort_of_several_choices(vllm: VllmBackend, stream: bool) -> None:
    o, chunks = await aborted(vllm, chat(max_tokens=5000, n=2, temperature=1, stream=stream))
    assert o.finish_reason == "abort"
    assert bool(o.text) == bool(chunks) == stream
    await no_request_left(vllm)


@EACH_KIND
async def test_an_abort_at_once(vllm: VllmBackend, make: Callable[..., Job]) -> None:
    running = asyncio.create_task(vllm.run(make(**LONG), nothing))
    await asyncio.sleep(0)
    vllm.abort("c/1")
    vllm.abort("c/1")
    vllm.abort("nobody/1")
    async with asyncio.timeout(3):
        assert (await running).finish_reason == "abort"
    await no_request_left(vllm)


@EACH_KIND
async def test_a_cancelled_run_leaves_nothing_in_the_engine(vllm: VllmBackend, make: Callable[..., Job]) -> None:
    running = asyncio.create_task(vllm.run(make(**LONG), nothing))
    await asyncio.sleep(0.2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await no_request_left(vllm)


async def no_request_left(vllm: VllmBackend) -> None:
    assert vllm._engine is not None
    processor = vllm._engine.llm.output_processor
    for _ in range(150):
        if not processor.request_states and not processor.parent_requests:
            break
        await asyncio.sleep(0.02)
    assert not processor.request_states
    assert not processor.parent_requests
    assert not vllm._runs


# -- invalid requests


@pytest.mark.parametrize(("body", "why"), BAD_GENERATE)
async def test_bad_generate_bodies(vllm: VllmBackend, body: dict[str, Any], why: str) -> None:
    assert why in await rejected(vllm, generate(**body))


@pytest.mark.parametrize(("j", "why"), BAD_OPENAI)
async def test_bad_openai_bodies(vllm: VllmBackend, j: Job, why: str) -> None:
    assert why in await rejected(vllm, j)


# -- resuming a lost attempt


@EACH_KIND
@pytest.mark.parametrize("seen", [1, 2, 9, 23, 99])
async def test_a_resumed_stream_equals_an_undisturbed_one(
    vllm: VllmBackend, make: Callable[..., Job], seen: int
) -> None:
    j = make(stream=True)
    whole, chunks = await streamed(vllm, j)
    o, rest = await streamed(vllm, again(j, chunks[:seen]))
    assert said(chunks[:seen]) + said(rest) == whole.text == o.text
    assert o.token_ids == whole.token_ids
    assert (o.prompt_tokens, o.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert (o.finish_reason, o.response) == (whole.finish_reason, whole.response)


@OPENAI_KINDS
async def test_a_stream_resumes_twice_under_one_id(vllm: VllmBackend, make: Callable[..., Job]) -> None:
    j = make(stream=True, stream_options={"include_usage": True})
    whole, first = await streamed(vllm, j)
    await asyncio.sleep(1.1)  # so that the creation time would differ
    _, second = await streamed(vllm, again(j, first[:4]))
    seen = first[:4] + second[:5]
    _, third = await streamed(vllm, again(j, seen))
    chunks = seen + third
    assert said(chunks) == whole.text
    assert finish_reasons(chunks) == ["length"]
    docs = [json.loads(p.document) for p in chunks]
    assert len({(d["id"], d["created"]) for d in docs}) == 1
    assert [d["usage"]["completion_tokens"] for d in docs if d.get("usage")] == [24]


async def test_an_aborted_stream_can_be_resumed(vllm: VllmBackend) -> None:
    """The end that the engine sends after an abort is not published, so the stream can continue."""
    j = chat(max_tokens=400, stream=True)
    whole, _ = await streamed(vllm, j)
    _, chunks = await aborted(vllm, j)
    o, rest = await streamed(vllm, again(j, chunks))
    assert said(chunks) + said(rest) == whole.text == o.text


@EACH_KIND
@pytest.mark.parametrize("seen", range(1, 8))
async def test_a_stop_string_across_attempts(vllm: VllmBackend, make: Callable[..., Job], seen: int) -> None:
    undisturbed = await vllm.run(make(), nothing)
    words = undisturbed.text.split(" ")
    assert len(words) > 8, undisturbed
    j = make(stop=[" ".join(words[4:8])[1:-1]], stream=True)
    whole, chunks = await streamed(vllm, j)
    o, rest = await streamed(vllm, again(j, chunks[:seen]))
    assert said(chunks[:seen]) + said(rest) == whole.text == o.text
    assert o.finish_reason == whole.finish_reason == "stop"
    assert o.completion_tokens == whole.completion_tokens
    await no_request_left(vllm)


@pytest.mark.parametrize("seen", range(1, 10))
async def test_a_character_across_attempts(vllm: VllmBackend, seen: int) -> None:
    assert vllm._engine is not None
    bytes_of_it = await vllm._engine.tokenize("é€")
    j = generate(allowed_token_ids=bytes_of_it, max_tokens=12, stream=True)
    whole, chunks = await streamed(vllm, j)
    o, rest = await streamed(vllm, again(j, chunks[:seen]))
    assert said(chunks[:seen]) + said(rest) == whole.text == o.text


@pytest.mark.parametrize(
    "more", [{"logprobs": True}, {"n": 2, "temperature": 1}, {"response_format": {"type": "json_object"}}]
)
async def test_some_streams_cannot_be_resumed(vllm: VllmBackend, more: dict[str, Any]) -> None:
    j = chat(stream=True, **more)
    _, chunks = await streamed(vllm, j)
    why = await rejected(vllm, again(j, chunks[:3]))
    assert "cannot be resumed. Submit the call again" in why
    assert 'on_engine_loss="restart"' in why


async def test_a_stream_of_another_kind_of_engine_is_refused(vllm: VllmBackend) -> None:
    foreign = [Chunk(document="{}", replay="sim 1 2 3")]
    assert "cannot be resumed" in await rejected(vllm, again(chat(), foreign))
    assert "cannot be resumed" in await rejected(vllm, again(generate(), [Chunk(text="some text")]))


# -- ends


@EACH_KIND
async def test_an_engine_that_is_stopped(vllm: VllmBackend, make: Callable[..., Job]) -> None:
    """Its calls end without an error, so that they are released; the published part can be resumed."""
    engine = vllm._engine
    assert engine is not None
    dead = asyncio.create_task(vllm.died())
    chunks: list[Chunk] = []
    running = asyncio.create_task(vllm.run(make(**LONG, stream=True), chunks.append))
    await asyncio.sleep(0.4)
    await engine.llm.abort(list(engine.llm.output_processor.external_req_ids))  # as it does on SIGTERM
    async with asyncio.timeout(3):
        assert (await running).finish_reason == "abort"
        assert (await vllm.run(make(), nothing)).finish_reason == "abort"
        assert await dead
    assert not any("abort" in p.document + p.replay for p in chunks)
    engine.ending = False


async def test_a_wrong_argument_is_named() -> None:
    backend = VllmBackend(EngineConfig(engine_id="x", engine_args={"no_such_thing": 1}), Settings())
    with pytest.raises(EngineDied, match="has no argument no_such_thing"):
        await backend.start()
    await backend.stop(0)


@pytest.mark.parametrize("arguments", [{"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}])
async def test_the_engine_of_a_killed_worker_ends(arguments: dict[str, Any]) -> None:
    command = [sys.executable, "-c", HOST, json.dumps(arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as host:
        try:
            assert host.stdout is not None
            lines = iter(host.stdout.readline, "")
            core = next(int(line.split()[1]) for line in lines if line.startswith("core "))
        finally:
            host.kill()
    eventually(lambda: not psutil.pid_exists(core), 15, "EngineCore to end with its worker")


async def test_the_engine_dies(vllm: VllmBackend) -> None:
    """Keep this test last: no call can run after it."""
    dead = asyncio.create_task(vllm.died())
    jobs = [
        make(**LONG, stream=stream, key=f"{make.__name__}{stream}/1")
        for make in (generate, chat, completion)
        for stream in (False, True)
    ]
    running = [asyncio.create_task(streamed(vllm, j)) for j in jobs]
    await asyncio.sleep(0.5)
    assert not dead.done()
    assert vllm.load().kv_usage > 0
    os.kill(engine_core().pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        assert await dead == "vLLM's engine process has ended."
        ends = await asyncio.gather(*running, return_exceptions=True)
    assert [type(e) for e in ends] == [EngineDied] * len(jobs)
    with pytest.raises(EngineDied):
        await vllm.run(generate(), nothing)
