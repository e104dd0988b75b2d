"""`rsm sim-server`: a real process over HTTP, and the `openai` backend with it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import pytest_asyncio

from rsm.broker.errors import InvalidRequest
from rsm.workers.backends.base import EngineDied, Job
from rsm.workers.backends.openai.backend import OpenAIBackend
from rsm.workers.backends.sim.backend import SimBackend
from rsm.workers.backends.sim.server import listen, serve
from tests.support.chunks import Heard
from tests.support.rsm_command import run as run_rsm
from tests.support.sim_http import SimHttp, sim_server
from tests.support.sim_processes import said
from tests.support.waiting import eventually

LONG = "a prompt of more than one block of the cache, " * 8


@pytest.fixture(scope="module")
def running() -> Iterator[SimHttp]:
    with sim_server() as server:
        yield server


@pytest.fixture
def http(running: SimHttp) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=20) as client:
        yield client


def events(response: httpx.Response) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in response.iter_lines() if line)


def gauge(http: httpx.Client, name: str) -> float:
    """A value of /metrics."""
    lines = http.get("/metrics").text.splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"vllm:{name}{{")))


def test_it_reports_its_health_and_its_model(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["m"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_gives_the_text_token_by_token(http: httpx.Client, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    body |= {"max_tokens": 5, "model": "m"}
    whole = http.post(path, json=body).json()
    with http.stream("POST", path, json=body | {"stream": True, "stream_options": {"include_usage": True}}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *documents, last = events(response)
    assert last == "[DONE]"
    *chunks, usage = map(json.loads, documents)
    choices = [c["choices"][0] for c in chunks]
    texts = [c["delta"].get("content", "") if chat else c["text"] for c in choices]
    text = whole["choices"][0]["message"]["content"] if chat else whole["choices"][0]["text"]
    assert "".join(texts) == text
    assert len(list(filter(None, texts))) == 5
    assert [c["finish_reason"] for c in choices][-1] == "length"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 5)
    if not chat:
        assert text == said("hi", 5)


def test_a_prompt_seen_before_is_cached(http: httpx.Client) -> None:
    first, second = (http.post("/v1/completions", json={"prompt": LONG}).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] >= 16
    assert gauge(http, "prefix_cache_hits_total") >= 16


def aborted(http: httpx.Client) -> int:
    """The number of calls that ended because their client disconnected."""
    found = re.search(r'finished_reason="abort"} (\d+)', http.get("/metrics").text)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_are_counted_as_the_engine_counts_them(http: httpx.Client, chat: bool) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": LONG}]} if chat else {"prompt": LONG}
    counted = http.post("/tokenize", json=body).json()
    usage = http.post(f"/v1/{'chat/' * chat}completions", json=body).json()["usage"]
    assert counted["count"] == len(counted["tokens"]) == usage["prompt_tokens"]
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/tokenize", json=body | {"model": "other"}).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_aborts_the_call(http: httpx.Client, running: SimHttp, stream: bool) -> None:
    body = {"prompt": "a long story", "max_tokens": 50_000, "stream": stream}
    before = aborted(http)
    if stream:
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as response:
            assert next(events(response))
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/v1/completions", json=body, timeout=0.5)
    eventually(lambda: aborted(http) == before + 1)
    assert gauge(http, "num_requests_running") == 0
    assert gauge(http, "kv_cache_usage_perc") == 0


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b'{"prompt": ""}', 400, "non-empty"),
        (b'{"prompt": "x", "max_tokens": 0}', 400, "max_tokens"),
        (b'{"prompt": "x", "max_tokens": 0, "stream": true}', 400, "max_tokens"),
        (b'{"prompt": "x", "model": "other"}', 404, "'other' does not exist"),
    ],
)
def test_errors_are_openais_error_objects(http: httpx.Client, body: bytes, status: int, why: str) -> None:
    reply = http.post("/v1/completions", content=body)
    assert reply.status_code == status
    assert why in reply.json()["error"]["message"]
    assert reply.json()["error"]["code"] == status


def test_a_reply_does_not_wait_for_the_acknowledgement_of_its_head() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_in_use_gives_an_error_message(running: SimHttp) -> None:
    done = run_rsm("sim-server", "--port", str(running.port))
    assert done.returncode == 1
    assert "Cannot listen on" in done.stderr


async def test_without_the_extra_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'rsm-engine\[server\]'"):
        await serve(SimBackend(), "127.0.0.1", 0, 1)


def test_sigterm_lets_open_calls_finish() -> None:
    with sim_server() as server:
        body = {"prompt": "x", "max_tokens": 50, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            texts = events(response)
            next(texts)
            server.process.send_signal(signal.SIGTERM)
            assert list(texts)[-1] == "[DONE]"
        assert server.process.wait(10) == 0


# -- the `openai` backend with it


@pytest_asyncio.fixture
async def backend(running: SimHttp) -> AsyncIterator[OpenAIBackend]:
    made = OpenAIBackend(f"{running.url}/v1")
    await made.start()
    yield made
    await made.stop(0)


def job(**more: Any) -> Job:
    return Job("c/1", "c", "s", "generate", {"prompt": "Tell me", "max_tokens": 30}, stream=True, **more)


async def test_the_openai_backend_runs_calls_on_it(backend: OpenAIBackend) -> None:
    received = Heard()
    outcome = await backend.run(job(), received.hear)
    assert outcome.text == "".join(p.text for p in received) == said("Tell me", 30)
    assert outcome.completion_tokens == 30


@pytest.mark.parametrize("kind", ["generate", "completions", "chat.completions"])
async def test_an_attempt_resumes_where_a_dead_server_stopped(backend: OpenAIBackend, kind: str) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me"}]}
    asked = (asked if kind == "chat.completions" else {"prompt": "Tell me"}) | {"max_tokens": 30}
    first = Job("c/1", "c", "s", kind, asked, stream=True)
    whole = await backend.run(replace(first, key="c/0"), Heard().hear)
    received = Heard()
    with sim_server() as victim:
        doomed = OpenAIBackend(f"{victim.url}/v1")
        await doomed.start()
        attempt = asyncio.create_task(doomed.run(first, received.hear))
        await received.first(5)
        victim.process.kill()
        with pytest.raises(EngineDied):
            await attempt
        await doomed.stop(0)
    assert len(received) < 30
    outcome = await backend.run(replace(first, resumed=received.resumed()), received.hear)
    assert outcome.text == whole.text
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (whole.prompt_tokens, 30)
    assert len(received) == 30 + (kind == "chat.completions"), "each token once"
