"""The systems of the stream benchmark, each with three equal engines that can be killed one by one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import httpx

from bench.http_servers import MODEL, PATIENCE_S, router, sglang_router, sim_servers, vllm_router
from bench.venvs import version_of
from rsm.broker import AsyncClient, Settings
from rsm.broker.protocol.ids import new_id
from rsm.broker.views.monitor import Monitor
from rsm.engine.fleet import Fleet
from rsm.workers.backends.openai.wire import SseParser
from rsm.workers.config import EngineConfig

ENGINES = 3
TOKEN_S = 0.02
ENGINE_ARGS = {"step_s": TOKEN_S, "prefill_token_s": 0, "decode_seq_s": 0, "context_token_s": 0}


@dataclass(frozen=True, slots=True)
class Ask:
    """One call."""

    session: str
    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Setup:
    """A running system. `stream` yields the text of a call in chunks, and raises if the stream is cut."""

    stream: Callable[[Ask], AsyncIterator[str]]
    running: Callable[[], Mapping[str, int]]  # streams on each engine
    kill: Callable[[str], None]  # kill -9 of one engine


class StreamCut(Exception):
    """The stream was cut before its end."""


# -- ours


@asynccontextmanager
async def ours_local(url: str, log: IO[bytes]) -> AsyncIterator[Setup]:
    """Runs three workers, each with a modelled engine."""
    configs = [_engine(i, backend="sim", model=MODEL, engine_args=ENGINE_ARGS) for i in range(ENGINES)]
    with _fleet(url, configs, log) as fleet:

        def kill(engine: str) -> None:
            process = fleet.workers[engine]._process
            assert process is not None
            process.kill()

        async with AsyncClient(settings=fleet.settings) as client:
            yield Setup(_our_stream(client), _our_running(fleet.settings), kill)


@asynccontextmanager
async def ours_remote(url: str, log: IO[bytes]) -> AsyncIterator[Setup]:
    """Runs three `openai` workers, each in front of its own server."""
    with sim_servers(ENGINES, ENGINE_ARGS, log) as servers:
        names = {f"e{i}": server for i, server in enumerate(servers)}
        configs = [
            _engine(i, backend="openai", base_url=f"{server.url}/v1", model=MODEL) for i, server in enumerate(servers)
        ]
        with _fleet(url, configs, log) as fleet:
            async with AsyncClient(settings=fleet.settings) as client:
                running = _our_running(fleet.settings)
                yield Setup(_our_stream(client), running, lambda engine: names[engine].process.kill())


def _engine(number: int, **more: Any) -> EngineConfig:
    return EngineConfig(engine_id=f"e{number}", **more)


@contextmanager
def _fleet(url: str, configs: Sequence[EngineConfig], log: IO[bytes]) -> Iterator[Fleet]:
    settings = Settings(namespace=f"bench-{new_id()}", drain_grace_s=0, result_ttl_s=60).with_redis(url)
    fleet = Fleet(settings, output=log.fileno())
    fleet.start(configs)
    try:
        yield fleet
    finally:
        fleet.stop()


def _our_stream(client: AsyncClient) -> Callable[[Ask], AsyncIterator[str]]:
    async def stream(ask: Ask) -> AsyncIterator[str]:
        call = await client.submit(ask.prompt, session=ask.session, stream=True, max_tokens=ask.max_tokens)
        async for chunk in call.stream():
            yield chunk.text

    return stream


def _our_running(settings: Settings) -> Callable[[], Mapping[str, int]]:
    monitor = Monitor(settings)
    return lambda: {str(e["engine_id"]): int(e["running"]) for e in monitor.engines()}


# -- third-party routers in front of `rsm sim-server`


@asynccontextmanager
async def before_router(command: Sequence[str], log: IO[bytes]) -> AsyncIterator[Setup]:
    """Runs a third-party router in front of three servers."""
    with sim_servers(ENGINES, ENGINE_ARGS, log) as servers, router(command, servers, log) as found:
        by_url = {server.url: server for server in servers}
        async with httpx.AsyncClient(base_url=found.url, timeout=PATIENCE_S) as client:
            yield Setup(
                _http_stream(client),
                lambda: {name: _running(name) for name in by_url},
                lambda name: by_url[name].process.kill(),
            )


@asynccontextmanager
async def through_vllm_router(url: str, log: IO[bytes]) -> AsyncIterator[Setup]:
    async with before_router(vllm_router("consistent_hash"), log) as setup:
        yield setup


@asynccontextmanager
async def through_sglang_router(url: str, log: IO[bytes]) -> AsyncIterator[Setup]:
    async with before_router(sglang_router("cache_aware"), log) as setup:
        yield setup


def _running(url: str) -> int:
    lines = httpx.get(f"{url}/metrics", timeout=5).text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllm:num_requests_running{"))


def _http_stream(client: httpx.AsyncClient) -> Callable[[Ask], AsyncIterator[str]]:
    async def stream(ask: Ask) -> AsyncIterator[str]:
        body = {"model": MODEL, "prompt": ask.prompt, "max_tokens": ask.max_tokens, "stream": True}
        headers = {"X-Session-ID": ask.session}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
            if reply.status_code != 200:
                raise StreamCut(f"status {reply.status_code}")
            parser, done = SseParser(), False
            async for data in reply.aiter_bytes():
                for event in parser.feed(data):
                    text, last = read_event(event)
                    done = done or last
                    yield text
        if not done:
            raise StreamCut("ended early")

    return stream


def read_event(event: str) -> tuple[str, bool]:
    """Returns the text of one event of a completions stream, and whether it is the last event.

    Raises:
        StreamCut: the event is an error.
    """
    if event == "[DONE]":
        return "", True
    doc = json.loads(event)
    if "error" in doc:
        raise StreamCut("error in the stream")
    choice: dict[str, Any] = next(iter(doc.get("choices") or ()), {})
    return choice.get("text") or "", bool(choice.get("finish_reason"))


@dataclass(frozen=True, slots=True)
class System:
    """One line of the comparison. The page shows the version of `package` in the environment `venv` ("": this one)."""

    name: str
    package: str
    venv: str
    engines: str
    run: Any

    def version(self) -> str:
        return version_of(self.package, self.venv)


SYSTEMS = (
    System("rsm-engine", "rsm-engine", "", "3 workers with modelled engines; one is killed", ours_local),
    System("rsm-engine", "rsm-engine", "", "3 `openai` workers, each with a server; a server is killed", ours_remote),
    System("vllm-router", "vllm-router", "vllm-router", "the same 3 servers; one is killed", through_vllm_router),
    System(
        "sglang-router", "sglang-router", "sglang-router", "the same 3 servers; one is killed", through_sglang_router
    ),
)
