"""The modelled engine behind the worker's interface."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from rsm.workers.backends.base import CallRejected, Chunk, Job, Outcome, Resumed
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


@pytest_asyncio.fixture
async def instant() -> AsyncIterator[SimBackend]:
    backend = SimBackend(SimConfig(times=SimTimes.zero()))
    await backend.start()
    yield backend
    await backend.stop(0)


async def streamed(backend: SimBackend, j: Job) -> tuple[Outcome, Heard]:
    chunks = Heard()
    return await backend.run(j, chunks.hear), chunks


async def test_start_reports_facts_about_the_engine() -> None:
    backend = SimBackend(SimConfig(model="m", max_num_seqs=3, kv_tokens=100, block_size=16))
    facts = await backend.start()
    await backend.stop(0)
    assert (facts.model, facts.max_num_seqs, facts.kv_tokens) == ("m", 3, 96)


async def test_generate_gives_text_ids_and_counts(sim: SimBackend) -> None:
    out = await sim.run(job(), nothing)
    assert out.finish_reason == "length"
    assert len(out.token_ids) == out.completion_tokens == 8
    assert out.text == "".join(f" w{i}" for i in out.token_ids)
    assert out.prompt_tokens == 7
    assert out.ttft_ms is not None
    assert 2 <= out.ttft_ms < 1000
    assert out.response is None


async def test_sixteen_tokens_by_default(sim: SimBackend) -> None:
    out = await sim.run(job({"prompt_token_ids": [5, 6, 7]}), nothing)
    assert (out.prompt_tokens, out.completion_tokens) == (3, 16)


async def test_output_is_cut_at_the_model_length() -> None:
    backend = SimBackend(SimConfig(times=SimTimes.zero(), max_model_len=10))
    await backend.start()
    out = await backend.run(job({"prompt_token_ids": [1] * 9, "max_tokens": 5}), nothing)
    assert (out.completion_tokens, out.finish_reason) == (1, "length")
    with pytest.raises(CallRejected, match="has 10 tokens; this engine takes at most 9"):
        await backend.run(job({"prompt_token_ids": [1] * 10}), nothing)
    await backend.stop(0)


async def test_a_stream_has_one_chunk_for_each_token(sim: SimBackend) -> None:
    out, chunks = await streamed(sim, job(stream=True))
    assert [p.token_ids for p in chunks] == [[i] for i in out.token_ids]
    assert "".join(p.text for p in chunks) == out.text


async def test_a_call_that_does_not_stream_emits_nothing(sim: SimBackend) -> None:
    out, chunks = await streamed(sim, job())
    assert out.completion_tokens == 8
    assert chunks == []


async def test_a_stop_string_ends_the_answer_and_is_never_published(sim: SimBackend) -> None:
    whole = await sim.run(job(), nothing)
    stop = f" w{whole.token_ids[3]}"
    body = {"prompt": "Explain quantum computing", "max_tokens": 8, "stop": [stop]}
    out, chunks = await streamed(sim, job(body, stream=True))
    assert out.finish_reason == "stop"
    assert out.token_ids == whole.token_ids[:4]
    assert out.text == whole.text[: whole.text.index(stop)] == "".join(p.text for p in chunks)


async def test_ignore_eos_runs_to_the_limit() -> None:
    backend = SimBackend(SimConfig(times=SimTimes.zero(), eos_mean=4))
    await backend.start()
    body = {"prompt": "hello", "max_tokens": 100}
    assert (await backend.run(job(body), nothing)).finish_reason == "stop"
    out = await backend.run(job(body | {"ignore_eos": True}), nothing)
    assert (out.finish_reason, out.completion_tokens) == ("length", 100)
    await backend.stop(0)


@pytest.mark.parametrize("cut", [1, 3, 7, 8])
@pytest.mark.parametrize("stop_at", [None, 5])
@pytest.mark.parametrize("on_instant", [False, True])
async def test_a_resumed_generate_gives_the_undisturbed_answer(
    sim: SimBackend, instant: SimBackend, cut: int, stop_at: int | None, on_instant: bool
) -> None:
    body: dict[str, Any] = {"prompt": "Explain quantum computing", "max_tokens": 8}
    if stop_at is not None:
        token = (await instant.run(job(body), nothing)).token_ids[stop_at]
        body["stop"] = f"{token}"[:2] + "never" if cut == 8 else f"w{token}"
    whole, chunks = await streamed(sim, job(body, stream=True))
    before = Heard(chunks[:cut]).resumed()
    again, more = await streamed(instant if on_instant else sim, job(body, stream=True, resumed=before))
    assert (again.text, again.token_ids, again.finish_reason) == (whole.text, whole.token_ids, whole.finish_reason)
    assert (again.prompt_tokens, again.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert before.text + "".join(p.text for p in more) == whole.text
    assert before.token_ids + [i for p in more for i in p.token_ids] == whole.token_ids


@pytest.mark.parametrize("kind", ["chat.completions", "completions"])
@pytest.mark.parametrize("cut", range(9))
async def test_a_resumed_openai_stream_never_repeats_a_chunk(sim: SimBackend, kind: str, cut: int) -> None:
    body = CHAT if kind == "chat.completions" else {"prompt": "hi there", "max_tokens": 6}
    body = body | {"stream_options": {"include_usage": True}}
    whole, chunks = await streamed(sim, job(body, kind, stream=True))
    again, more = await streamed(sim, job(body, kind, stream=True, resumed=Heard(chunks[:cut]).resumed()))

    def comparable(chunks: list[Chunk]) -> list[dict[str, Any]]:
        # The cached tokens may differ, and the time if nothing was published yet.
        return [json.loads(p.document) | {"created": 0, "usage": None} for p in chunks]

    assert comparable(chunks[:cut] + more) == comparable(chunks)
    if 0 < cut < len(chunks):
        assert json.loads(more[0].document)["created"] == json.loads(chunks[0].document)["created"]
    assert (again.text, again.token_ids) == (whole.text, whole.token_ids)


async def test_a_stream_of_another_kind_of_engine_cannot_resume(sim: SimBackend) -> None:
    before = Resumed("", [], ["vllm's own"], 3)
    with pytest.raises(CallRejected, match="Submit the call again"):
        await sim.run(job(CHAT, "chat.completions", stream=True, resumed=before), nothing)


async def test_chat_documents_have_openai_shape(sim: SimBackend) -> None:
    out = await sim.run(job(CHAT, "chat.completions"), nothing)
    assert out.response is not None
    choice = {"index": 0, "message": {"role": "assistant", "content": out.text}, "logprobs": None}
    assert out.response["choices"] == [choice | {"finish_reason": "length"}]
    assert out.response["object"] == "chat.completion"
    assert out.response["usage"]["total_tokens"] == out.prompt_tokens + 6
    _, chunks = await streamed(sim, job(CHAT, "chat.completions", stream=True))
    docs = [json.loads(p.document) for p in chunks]
    assert docs[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"]["content"] for c in docs) == out.text
    assert [c["choices"][0]["finish_reason"] for c in docs] == [None] * 6 + ["length"]
    assert {c["object"] for c in docs} == {"chat.completion.chunk"}


async def test_completions_documents_have_openai_shape(sim: SimBackend) -> None:
    body = {"prompt": ["hi there"], "max_tokens": 3, "model": "asked", "stream_options": {"include_usage": True}}
    out, chunks = await streamed(sim, job(body, "completions", stream=True))
    docs = [json.loads(p.document) for p in chunks]
    assert "".join(c["choices"][0]["text"] for c in docs[:-1]) == out.text
    assert (docs[-1]["choices"], docs[-1]["usage"]["completion_tokens"]) == ([], 3)
    assert out.response is not None
    assert out.response["choices"][0]["text"] == out.text
    assert out.response["model"] == "asked"


async def test_a_repeated_prompt_is_cached_and_its_answer_too(sim: SimBackend) -> None:
    prompt = "one two three " * 30
    first = await sim.run(job({"prompt": prompt, "max_tokens": 40}), nothing)
    again = await sim.run(job({"prompt": prompt}, key="d/1"), nothing)
    turn_2 = await sim.run(job({"prompt": f"{prompt}{first.text} And then?"}), nothing)
    assert first.cached_tokens == 0
    assert again.cached_tokens == (again.prompt_tokens - 1) // 16 * 16 > 0
    assert turn_2.cached_tokens > first.prompt_tokens


async def test_calls_are_batched() -> None:
    backend = SimBackend(SimConfig(times=SimTimes(step_s=0.05), max_num_seqs=4))
    await backend.start()
    began = time.perf_counter()
    bodies = [{"prompt": f"call {n}", "max_tokens": 5} for n in range(8)]
    outs = await asyncio.gather(*(backend.run(job(b, key=str(n)), nothing) for n, b in enumerate(bodies)))
    took = time.perf_counter() - began
    await backend.stop(0)
    assert 10 * 0.05 <= took < 20 * 0.05  # two batches of five steps, not eight
    ttft = [o.ttft_ms or 0 for o in outs]
    assert max(ttft[:4]) < 250 <= min(ttft[4:])


async def test_speed_scales_time() -> None:
    backend = SimBackend(SimConfig(times=SimTimes(step_s=1.0), speed=100))
    await backend.start()
    began = time.perf_counter()
    await backend.run(job(), nothing)
    took = time.perf_counter() - began
    await backend.stop(0)
    assert 0.08 <= took < 1


async def test_delays_of_the_event_loop_do_not_add_up() -> None:
    backend = SimBackend(SimConfig(times=SimTimes(step_s=0.0002)))  # a tenth of the real time of a sleep
    await backend.start()
    began = time.perf_counter()
    await backend.run(job({"prompt": "x", "max_tokens": 1000}), nothing)
    took = time.perf_counter() - began
    await backend.stop(0)
    assert 0.2 <= took < 0.7


async def test_priority_goes_first() -> None:
    backend = SimBackend(SimConfig(times=SimTimes(step_s=0.002), max_num_seqs=1))
    await backend.start()
    ends: list[str] = []

    async def run(key: str, priority: int, level: int) -> None:
        await backend.run(job(key=key, priority=priority, level=level), nothing)
        ends.append(key)

    plan = (("running", 0, 0), ("low", 1, 0), ("deep", 0, 2), ("shallow", 0, 1), ("urgent", -1, 5))
    await asyncio.gather(*(run(*p) for p in plan))
    await backend.stop(0)
    assert ends == ["urgent", "running", "shallow", "deep", "low"]


async def test_load_shows_cache_and_rate(sim: SimBackend) -> None:
    chunks = Heard()
    body = {"prompt_token_ids": list(range(4000)), "max_tokens": 5000}
    task = asyncio.create_task(sim.run(job(body, stream=True), chunks.hear))
    await chunks.first(20)
    load = sim.load()
    assert load.kv_usage == pytest.approx(0.01, abs=0.002)
    assert load.tokens_per_s > 50  # one token per 2 ms, with a margin for slow machines
    sim.abort("c/1")
    await task


@pytest.mark.parametrize(
    ("kind", "body", "why"),
    [
        ("generate", {}, "either prompt or prompt_token_ids"),
        ("generate", {"prompt": "a", "prompt_token_ids": [1]}, "either prompt or prompt_token_ids"),
        ("generate", {"prompt": ""}, "non-empty"),
        ("generate", {"prompt": ["a"]}, "must be a text"),
        ("generate", {"prompt_token_ids": []}, "non-empty"),
        ("generate", {"prompt_token_ids": [1, -1]}, "whole numbers, at least 0"),
        ("generate", {"prompt_token_ids": ["a"]}, "whole numbers, at least 0"),
        ("generate", {"prompt": "a", "max_tokens": 0}, "max_tokens must be a whole number, at least 1"),
        ("generate", {"prompt": "a", "max_tokens": 1.5}, "max_tokens must be a whole number"),
        ("generate", {"prompt": "a", "max_tokens": True}, "max_tokens must be"),
        ("generate", {"prompt": "a", "temperature": -0.1}, "temperature must be a number, at least 0"),
        ("generate", {"prompt": "a", "top_p": 1.1}, "top_p must be a number from 0 to 1"),
        ("generate", {"prompt": "a", "n": 2}, "n must be 1"),
        ("generate", {"prompt": "a", "stop": [""]}, "stop must be"),
        ("generate", {"prompt": "a", "stop": 5}, "stop must be"),
        ("chat.completions", {"messages": []}, "at least one message"),
        ("chat.completions", {"messages": [{"role": "user", "content": 5}]}, "content of a message"),
        ("completions", {"prompt": ["a", "b"]}, "submit one call per prompt"),
        ("embeddings", {"input": "a"}, "does not serve embeddings"),
    ],
)
async def test_invalid_bodies_are_rejected(instant: SimBackend, kind: str, body: dict[str, Any], why: str) -> None:
    with pytest.raises(CallRejected, match=why):
        await instant.run(job(body, kind), nothing)


async def test_an_instant_engine_gives_the_same_answer_without_waiting(sim: SimBackend, instant: SimBackend) -> None:
    for j in (job(), job(CHAT, "chat.completions"), job({"prompt_token_ids": [3, 4]})):
        slow, fast = await sim.run(j, nothing), await instant.run(j, nothing)
        assert (fast.text, fast.token_ids, fast.finish_reason) == (slow.text, slow.token_ids, slow.finish_reason)
        assert (fast.prompt_tokens, fast.completion_tokens) == (slow.prompt_tokens, slow.completion_tokens)
    coroutine = instant.run(job(), nothing)
    with pytest.raises(StopIteration):  # it ends without yielding to the event loop
        coroutine.send(None)


async def test_an_instant_stream_has_the_same_chunks(sim: SimBackend, instant: SimBackend) -> None:
    _, slow = await streamed(sim, job(stream=True))
    _, fast = await streamed(instant, job(stream=True))
    assert fast == slow


async def test_an_instant_call_costs_next_to_nothing(instant: SimBackend) -> None:
    async def us_per_call(max_tokens: int) -> float:
        j, best = job({"prompt": "Explain quantum computing", "max_tokens": max_tokens}), float("inf")
        for _ in range(10):
            began = time.process_time()
            for _ in range(200):
                await instant.run(j, nothing)
            best = min(best, (time.process_time() - began) / 200 * 1e6)
        return best

    assert await us_per_call(16) < 60  # 11 µs on the development machine
    assert await us_per_call(4000) < 200  # a loop over tokens would cost much more


async def test_prompts_stay_out_of_reprs(sim: SimBackend) -> None:
    task = asyncio.create_task(sim.run(job({"prompt": "secret words", "max_tokens": 50}), nothing))
    await asyncio.sleep(0.01)
    assert "secret" not in repr(sim._live)
    sim.abort("c/1")
    await task
