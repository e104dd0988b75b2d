"""The `openai` backend with a fake server, because no real one is available where these tests run."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr

from rsm.broker.settings import Settings
from rsm.workers.backends.base import CallRejected, EngineDied, EngineError, EngineMisconfigured, Job, Outcome, Resumed
from rsm.workers.backends.factory import create_backend
from rsm.workers.backends.openai.backend import OpenAIBackend
from rsm.workers.backends.openai.resume import Transcript
from rsm.workers.config import EngineConfig
from tests.support.chunks import Heard
from tests.support.fake_openai import WORDS, Server

KEY = "sk-very-secret"
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    fake = Server()
    await fake.open()
    yield fake
    await fake.close()


@pytest.fixture(autouse=True)
def no_key_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RSM_OPENAI_API_KEY", raising=False)


@pytest_asyncio.fixture
async def start(server: Server) -> AsyncIterator[Callable[..., Any]]:
    backends: list[OpenAIBackend] = []

    async def begin(**more: Any) -> OpenAIBackend:
        backend = OpenAIBackend(server.url, **({"api_key": SecretStr(KEY)} | more))
        await backend.start()
        backends.append(backend)
        return backend

    yield begin
    for backend in backends:
        await backend.stop(0)


def job(body: dict[str, Any] | None = None, kind: str = "generate", **more: Any) -> Job:
    body = {"prompt": "Say it", "max_tokens": 6} if body is None else body
    return Job(key="c/1", call_id="c", session="s", kind=kind, body=body, **more)


async def run(backend: OpenAIBackend, j: Job) -> tuple[Outcome, Heard]:
    received = Heard()
    return await asyncio.wait_for(backend.run(j, received.hear), 10), received


async def test_start_finds_the_model_and_the_kind_of_server(server: Server, start: Any) -> None:
    server.vllm = True
    backend = OpenAIBackend(server.url + "/", max_num_seqs=7, kv_tokens=9)
    facts = await backend.start()
    await backend.stop(0)
    assert (facts.model, facts.max_num_seqs, facts.kv_tokens, facts.version) == ("the-model", 7, 9, "vllm")


async def test_generate_streams_text_and_counts(server: Server, start: Any) -> None:
    server.models = ["the-model", "mine"]
    backend = await start(model="mine")
    out, received = await run(backend, job({"prompt": "Say it", "max_tokens": 6, "temperature": 0.5}, stream=True))
    assert [p.text for p in received] == WORDS[:6]
    assert (out.text, out.finish_reason) == ("".join(WORDS[:6]), "length")
    assert (out.prompt_tokens, out.completion_tokens, out.cached_tokens) == (5, 6, 4)
    assert out.ttft_ms is not None
    sent = server.requests[0]
    assert (sent["path"], sent["model"], sent["prompt"], sent["temperature"]) == (
        "/v1/completions", "mine", "Say it", 0.5,
    )  # fmt: skip
    assert "return_token_ids" not in sent


async def test_vllm_is_asked_for_token_ids(server: Server, start: Any) -> None:
    server.vllm = True
    out, received = await run(await start(), job({"prompt_token_ids": [1, 2], "max_tokens": 3}, stream=True))
    assert server.requests[0]["prompt"] == [1, 2]
    assert [p.token_ids for p in received] == [[1000], [1001], [1002]]
    assert out.token_ids == [1000, 1001, 1002]


@pytest.mark.parametrize("vllm", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_a_broken_generate_is_resumed(server: Server, start: Any, vllm: bool, as_ids: bool) -> None:
    server.vllm, server.cut_after = vllm, 2
    backend = await start()
    body = {"prompt_token_ids": [1, 2]} if as_ids else {"prompt": "Say it"}
    received = Heard()
    with pytest.raises(EngineError, match="failed: RemoteProtocolError"):
        await backend.run(job(body | {"max_tokens": 6}, stream=True), received.hear)
    assert len(received) == 2
    server.cut_after = None
    again = job(body | {"max_tokens": 6}, stream=True, resumed=received.resumed())
    if as_ids and not vllm:
        with pytest.raises(CallRejected, match="cannot be resumed"):
            await run(backend, again)
        return
    out, more = await run(backend, again)
    assert server.requests[-1]["max_tokens"] == 4
    assert out.text == "".join(WORDS[:6]) == received.resumed().text + "".join(p.text for p in more)
    assert (out.prompt_tokens, out.completion_tokens) == (5, 6)
    assert out.token_ids == ([1000, 1001, 1002, 1003, 1004, 1005] if vllm else [])


async def test_a_generate_that_was_complete_is_not_sent_again(server: Server, start: Any) -> None:
    backend = await start()
    first, received = await run(backend, job(stream=True))
    out, more = await run(backend, job(stream=True, resumed=received.resumed()))
    assert (out.text, out.finish_reason, more) == (first.text, "length", [])
    assert out.completion_tokens == 6
    assert len(server.requests) == 1


async def test_a_generate_that_had_stopped_early_is_not_sent_again(server: Server, start: Any) -> None:
    before = Resumed(" w0 w1", [], ["1", "2 stop"], 0)
    out, _ = await run(await start(), job(stream=True, resumed=before))
    assert (out.text, out.finish_reason, out.completion_tokens) == (" w0 w1", "stop", 2)
    assert server.requests == []


async def test_resuming_without_any_count_estimates_it(server: Server, start: Any) -> None:
    await run(await start(), job(resumed=Resumed(" w0 w1", [], [], 0)))
    assert (server.requests[0]["prompt"], server.requests[0]["max_tokens"]) == ("Say it w0 w1", 4)


@pytest.mark.parametrize("kind", ["chat.completions", "completions"])
@pytest.mark.parametrize("asked", [False, True])
async def test_openai_streams_are_forwarded(server: Server, start: Any, kind: str, asked: bool) -> None:
    body: dict[str, Any] = CHAT if kind == "chat.completions" else {"prompt": "Say", "max_tokens": 4}
    if asked:
        body = body | {"stream_options": {"include_usage": True}}
    out, received = await run(await start(), job(body, kind, stream=True))
    chunks = [json.loads(p.document) for p in received]
    assert [bool(c["choices"]) for c in chunks].count(False) == asked
    assert len(chunks) == 4 + (kind == "chat.completions") + asked
    assert (out.text, out.completion_tokens, out.cached_tokens) == ("".join(WORDS[:4]), 4, 4)
    assert out.response is not None
    assert out.response["object"] == ("chat.completion" if kind == "chat.completions" else "text_completion")
    assert out.response["choices"][0]["finish_reason"] == "length"
    assert server.requests[0]["model"] == "the-model"
    assert server.requests[0]["stream_options"] == {"include_usage": True}


async def test_a_call_that_does_not_stream_gets_the_servers_body(server: Server, start: Any) -> None:
    body = CHAT | {"model": "asked", "stream": True, "stream_options": {"include_usage": True}}
    out, received = await run(await start(), job(body, "chat.completions"))
    assert received == []
    assert out.response == server.whole("/v1/chat/completions", body)
    assert (out.text, out.prompt_tokens, out.ttft_ms) == ("".join(WORDS[:4]), 5, None)
    sent = server.requests[0]
    assert (sent["model"], sent["stream"], "stream_options" in sent) == ("asked", False, False)


async def test_embeddings(server: Server, start: Any) -> None:
    out, received = await run(await start(), job({"input": "hi"}, "embeddings", stream=True))
    assert out.response is not None
    assert out.response["data"][0]["embedding"] == [0.5]
    assert (out.prompt_tokens, out.finish_reason, received) == (3, "stop", [])
    assert server.requests[0] == {"input": "hi", "model": "the-model", "path": "/v1/embeddings"}


async def test_streams_survive_any_split_of_their_bytes(server: Server, start: Any) -> None:
    server.byte_by_byte = True
    out, received = await run(await start(), job(stream=True))
    assert [p.text for p in received] == WORDS[:6]
    assert out.completion_tokens == 6


async def test_the_error_of_a_broken_openai_stream_says_to_submit_again(server: Server, start: Any) -> None:
    server.cut_after = 2
    backend, received = await start(), Heard()
    with pytest.raises(CallRejected, match=r"died during this stream.* Submit the call again"):
        await backend.run(job(CHAT, "chat.completions", stream=True), received.hear)
    assert len(received) == 2
    with pytest.raises(CallRejected, match="Submit the call again"):
        await backend.run(job(CHAT, "chat.completions", stream=True, resumed=received.resumed()), received.hear)
    assert len(server.requests) == 1


@pytest.mark.parametrize("kind", ["chat.completions", "completions"])
async def test_a_broken_openai_stream_resumes_if_the_server_can(server: Server, start: Any, kind: str) -> None:
    chat = kind == "chat.completions"
    body: dict[str, Any] = CHAT if chat else {"prompt": "Say", "max_tokens": 4}
    body = body | {"stream_options": {"include_usage": True}}
    server.vllm, server.cut_after = chat, 2 + chat
    backend = await start()
    whole = server.whole(f"/v1/{'chat/' * chat}completions", body)
    with pytest.raises(EngineError):
        await backend.run(job(body, kind, stream=True), (received := Heard()).hear)
    server.cut_after = None
    out, more = await run(backend, job(body, kind, stream=True, resumed=received.resumed()))
    sent = server.requests[-1]
    assert sent["max_tokens"] == 2
    if chat:
        begun = {"role": "assistant", "content": " w0 w1"}
        assert (sent["messages"], sent["continue_final_message"]) == ([*CHAT["messages"], begun], True)  # type: ignore[misc]
        assert sent["add_generation_prompt"] is False
    else:
        assert sent["prompt"] == "Say w0 w1"
    *chunks, usage = [json.loads(p.document) for p in [*received, *more]]
    assert "".join(_text(c["choices"][0]) for c in chunks) == out.text == "".join(WORDS[:4])
    assert len(chunks) == 4 + chat, "one role, and each word once"
    assert len({c["id"] for c in chunks}) == 1
    counts = {"prompt_tokens": 5, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 4}}
    assert usage["usage"] == counts == whole["usage"]
    assert out.response is not None
    assert out.response["choices"][0]["finish_reason"] == "length"
    assert (out.prompt_tokens, out.completion_tokens) == (5, 4)


def _text(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or choice.get("delta", {}).get("content") or "")


async def test_an_openai_stream_with_only_its_role_published_starts_over(server: Server, start: Any) -> None:
    server.cut_after = 1
    backend = await start()
    with pytest.raises(EngineError):
        await backend.run(job(CHAT, "chat.completions", stream=True), (received := Heard()).hear)
    server.cut_after = None
    out, more = await run(backend, job(CHAT, "chat.completions", stream=True, resumed=received.resumed()))
    assert (len(received), len(more), out.text) == (1, 4, "".join(WORDS[:4]))
    assert server.requests[0] == server.requests[1]


async def test_an_openai_stream_that_had_ended_is_not_sent_again(server: Server, start: Any) -> None:
    backend = await start()
    first, received = await run(backend, job(CHAT, "chat.completions", stream=True))
    out, more = await run(backend, job(CHAT, "chat.completions", stream=True, resumed=received.resumed()))
    assert (out.text, out.finish_reason, more, len(server.requests)) == (first.text, "length", [], 1)


@pytest.mark.parametrize(
    "more", [{"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}}, {"messages": "none"}]
)
async def test_output_other_than_text_is_not_resumed(server: Server, start: Any, more: dict[str, Any]) -> None:
    server.vllm, server.cut_after = True, 3
    with pytest.raises(CallRejected, match="cannot be resumed"):
        await run(await start(), job(CHAT | more, "chat.completions", stream=True))


def test_a_tool_call_that_had_begun_is_not_resumed() -> None:
    call = {"index": 0, "function": {"name": "f", "arguments": "{"}}
    transcript = Transcript(
        [json.dumps({"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant", "tool_calls": [call]}}]})]
    )
    assert not transcript.resumable("chat.completions", CHAT, chats=True)
    transcript = Transcript([json.dumps({"id": "x", "choices": [{"index": 0, "delta": {"content": "Well"}}]})])
    assert transcript.resumable("chat.completions", CHAT, chats=True)
    assert not transcript.resumable("chat.completions", CHAT, chats=False)
    begun = {"messages": [*CHAT["messages"], {"role": "assistant", "content": "So: "}], "continue_final_message": True}  # type: ignore[misc]
    assert transcript.resumed("chat.completions", begun, chats=True)["messages"][-1]["content"] == "So: Well"


async def test_an_openai_stream_broken_before_its_first_chunk_may_run_again(server: Server, start: Any) -> None:
    server.cut_after = 0
    with pytest.raises(EngineError, match="RemoteProtocolError"):
        await run(await start(), job(CHAT, "chat.completions", stream=True))


async def test_a_complete_answer_does_not_need_the_end_of_the_stream(server: Server, start: Any) -> None:
    server.cut_after = 5  # role and four words; no usage, no [DONE]
    out, received = await run(await start(), job(CHAT, "chat.completions", stream=True))
    assert (out.finish_reason, out.completion_tokens, len(received)) == ("length", 4, 5)


@pytest.mark.parametrize("kind", ["generate", "chat.completions"])
async def test_abort_closes_the_connection_and_keeps_the_partial_text(server: Server, start: Any, kind: str) -> None:
    server.stall_after = 3
    backend, received = await start(), Heard()
    body = CHAT if kind == "chat.completions" else {"prompt": "Say it", "max_tokens": 6}
    task = asyncio.create_task(backend.run(job(body, kind, stream=True), received.hear))
    await received.first(3)
    backend.abort("c/1")
    backend.abort("c/1")
    out = await asyncio.wait_for(task, 2)
    await asyncio.wait_for(server.hung_up.wait(), 2)
    tokens = 2 if kind == "chat.completions" else 3
    assert (out.finish_reason, out.text, out.completion_tokens) == ("abort", "".join(WORDS[:tokens]), tokens)
    if kind == "chat.completions":
        assert out.response is not None
        assert out.response["choices"][0]["finish_reason"] == "abort"


async def test_a_cancelled_run_closes_the_connection_too(server: Server, start: Any) -> None:
    server.stall_after = 1
    backend, received = await start(), Heard()
    task = asyncio.create_task(backend.run(job(stream=True), received.hear))
    await received.first(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.hung_up.wait(), 2)


@pytest.mark.parametrize(
    ("status", "body", "raises", "message"),
    [
        (400, b'{"error": {"message": "max_tokens is too large"}}', CallRejected, "400: max_tokens is too large$"),
        (404, b'{"message": "no such model"}', CallRejected, "404: no such model"),
        (422, b'{"detail": [{"msg": "wrong"}]}', CallRejected, "wrong"),
        (400, b"plain words", CallRejected, "plain words"),
        (401, f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode(), EngineError, r"bad key \*\*\*"),
        (408, b"", EngineError, "408"),
        (429, b'{"error": "slow down"}', EngineError, "slow down"),
        (500, b"<html>", EngineError, "500"),
        (503, b"", EngineError, "503"),
        (302, b"", EngineError, "302"),
        (200, b"no json", EngineError, "not JSON"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_server(
    server: Server, start: Any, status: int, body: bytes, raises: type[Exception], message: str, stream: bool
) -> None:
    server.fail = (status, body)
    if status == 200 and stream:
        message = "ended its stream before the answer was complete"
    with pytest.raises(raises, match=message) as caught:
        await run(await start(), job(CHAT, "chat.completions", stream=stream))
    assert KEY not in str(caught.value)


async def test_errors_inside_a_stream(server: Server, start: Any) -> None:
    backend = await start()
    server.in_stream = {"error": {"message": "too long", "code": 400}}
    with pytest.raises(CallRejected, match="too long"):
        await run(backend, job(stream=True))
    server.in_stream = {"object": "error", "message": "out of memory", "code": 500}
    with pytest.raises(EngineError, match="out of memory"):
        await run(backend, job(stream=True))


@pytest.mark.parametrize(
    ("kind", "body", "why"),
    [
        ("generate", {}, "either prompt or"),
        ("generate", {"prompt": 5}, "must be a text"),
        ("generate", {"prompt_token_ids": "abc"}, "list of whole numbers"),
        ("generate", {"prompt": "a", "n": 2}, "n must be 1"),
        ("generate", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": b"bytes"}, "JSON cannot express"),
        ("completions", {"prompt": "a", "temperature": float("nan")}, "JSON cannot express"),
        ("speech", {}, "does not serve speech"),
    ],
)
async def test_invalid_calls_are_not_sent(
    server: Server, start: Any, kind: str, body: dict[str, Any], why: str
) -> None:
    with pytest.raises(CallRejected, match=why):
        await run(await start(), job(body, kind))
    assert server.requests == []


async def test_a_server_that_goes_away_is_dead(server: Server, start: Any) -> None:
    server.stall_after = 1
    backend, received = await start(health_s=0.1, health_misses=2), Heard()
    task = asyncio.create_task(backend.run(job(stream=True), received.hear))
    death = asyncio.create_task(backend.died())
    await received.first(1)
    await asyncio.sleep(0.3)
    assert not death.done()
    server.health = 503
    assert "has not answered 2 health checks" in await asyncio.wait_for(death, 5)
    with pytest.raises(EngineDied, match="health checks"):
        await asyncio.wait_for(task, 2)
    with pytest.raises(EngineDied, match="health checks"):
        await run(backend, job())


async def test_one_late_health_check_does_not_count_as_death(server: Server, start: Any) -> None:
    backend = await start(health_s=0.1, health_misses=4)
    server.health = 500
    await asyncio.sleep(0.25)
    server.health = 200
    await asyncio.sleep(0.25)
    server.health = 500
    await asyncio.sleep(0.25)
    server.health = 200
    out, _ = await run(backend, job())
    assert out.completion_tokens == 6


async def test_a_server_that_is_answering_is_not_dead(server: Server, start: Any) -> None:
    server.pause_s = 0.04
    backend = await start(health_s=0.1, health_misses=2)
    server.health = 503
    out, _ = await run(backend, job({"prompt": "Say it", "max_tokens": 20}, stream=True))
    assert out.completion_tokens == 20


async def test_a_server_whose_port_is_closed_is_dead_at_once(server: Server, start: Any) -> None:
    backend = await start()
    await server.close()
    with pytest.raises(EngineDied, match="no longer answers"):
        await run(backend, job())
    assert "no longer answers" in await asyncio.wait_for(backend.died(), 1)


async def test_a_server_that_dies_during_its_calls_is_dead_at_once(server: Server, start: Any) -> None:
    """Also for the calls whose connections are still open."""
    server.stall_after = 1
    backend = await start()
    stalled = [Heard(), Heard()]
    tasks = [
        asyncio.create_task(backend.run(replace(job(stream=True), key=f"c/{i}"), h.hear)) for i, h in enumerate(stalled)
    ]
    for received in stalled:
        await received.first(1)
    server.stall_after, server.cut_after, server.health = None, 1, 503
    with pytest.raises(EngineDied, match="no longer answers"):
        await run(backend, replace(job(stream=True), key="c/9"))
    for task in tasks:
        with pytest.raises(EngineDied, match="no longer answers"):
            await asyncio.wait_for(task, 1)


async def test_start_waits_for_a_server_that_comes_up(server: Server) -> None:
    server.health = 503
    backend = OpenAIBackend(server.url)
    starting = asyncio.create_task(backend.start())
    await asyncio.sleep(0.3)
    assert not starting.done()
    server.health = 200
    assert (await asyncio.wait_for(starting, 5)).model == "the-model"
    await backend.stop(0)


async def test_stop_ends_what_does_not_finish(server: Server, start: Any) -> None:
    server.stall_after = 1
    backend, received = await start(), Heard()
    task = asyncio.create_task(backend.run(job(stream=True), received.hear))
    await received.first(1)
    await backend.stop(0.1)
    with pytest.raises(EngineDied, match="stopped"):
        await task
    with pytest.raises(EngineDied, match="stopped"):
        await run(backend, job())


async def test_stop_lets_calls_finish_within_the_grace(server: Server, start: Any) -> None:
    backend, received = await start(), Heard()
    task = asyncio.create_task(backend.run(job(stream=True), received.hear))
    await asyncio.sleep(0)
    await backend.stop(5)
    assert (await task).completion_tokens == 6


async def test_a_failed_start_reports_its_cause(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.health = 401
    with pytest.raises(EngineMisconfigured, match="refuses the API key; set RSM_OPENAI_API_KEY"):
        await OpenAIBackend(server.url, connect_s=0).start()
    server.health = 502
    with pytest.raises(EngineDied, match="No OpenAI-compatible server") as away:
        await OpenAIBackend(server.url, connect_s=0).start()
    assert not isinstance(away.value, EngineMisconfigured), "it may still start"
    server.health = 404
    with pytest.raises(EngineMisconfigured, match="lists no models"):
        await OpenAIBackend(server.url).start()
    server.health = 200
    with pytest.raises(EngineMisconfigured, match="serves no model wrong, but the-model"):
        await OpenAIBackend(server.url, "wrong").start()
    with pytest.raises(ValueError, match="must be a URL such as"):
        OpenAIBackend("nonsense")
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(EngineDied, match=r"pip install 'rsm-engine\[openai\]'"):
        await OpenAIBackend(server.url).start()


@pytest.mark.parametrize(
    ("path", "body", "slots", "kv_tokens"),
    [
        ("/get_server_info", '{"max_running_requests": 48, "max_total_num_tokens": 90000}', 48, 90_000),
        ("/props", '{"total_slots": 4}', 4, 0),
        ("/server_info?config_format=json", '{"vllm_config": {"scheduler_config": {"max_num_seqs": 33}}}', 33, 0),
        ("/metrics", 'vllm:cache_config_info{block_size="16",num_gpu_blocks="1000",engine="0"} 1.0', 256, 16_000),
        ("/props", "[1, 2", 256, 0),
        ("/get_server_info", '{"max_running_requests": null}', 256, 0),
        ("/nothing", "", 256, 0),
    ],
)
async def test_a_server_is_asked_for_its_slots_and_cache(
    server: Server, path: str, body: str, slots: int, kv_tokens: int
) -> None:
    server.about[path] = body
    config = EngineConfig(engine_id="e", backend="openai", base_url=server.url)
    backend = create_backend(EngineConfig.model_validate_json(config.model_dump_json(exclude_unset=True)), Settings())
    facts = await backend.start()
    await backend.stop(0)
    assert (facts.max_num_seqs, facts.kv_tokens) == (slots, kv_tokens)
    named = create_backend(config.model_copy(update={"max_num_seqs": 7}), Settings())
    assert (await named.start()).max_num_seqs == 7
    await named.stop(0)


async def test_the_key_is_sent_and_never_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("RSM_OPENAI_API_KEY", KEY)
    backend = create_backend(EngineConfig(engine_id="e", backend="openai", base_url=server.url), Settings())
    assert isinstance(backend, OpenAIBackend)
    await backend.start()
    await run(backend, job({"prompt": "private words", "max_tokens": 2}, traceparent="00-ab-cd-01"))
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["traceparent"] == "00-ab-cd-01"
    shown = repr(backend) + repr(vars(backend)) + caplog.text
    assert KEY not in shown
    assert "private" not in shown
    await backend.stop(0)
    with pytest.raises(ValueError, match="not in the URL"):
        OpenAIBackend("http://user:pw@host/v1")


async def test_load_shows_the_rate(server: Server, start: Any) -> None:
    backend = await start()
    assert backend.load().tokens_per_s == 0
    await run(backend, job({"prompt": "a", "max_tokens": 50}))
    assert backend.load().tokens_per_s > 0
