"""The systems of the stream benchmark, each over three engines of the same parameters that can be killed one by one."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from subprocess import Popen
from typing import IO, Any

import httpx

from bench.venvs import python_for
from broker import AsyncClient, Settings, child
from broker.ids import new_id
from broker.monitor import Monitor
from engine.fleet import Fleet
from workers.config import EngineConfig
from workers.openai_wire import SseParser

ENGINES = 3
TOKEN_S = 0.02
ENGINE_ARGS = {"step_s": TOKEN_S, "prefill_token_s": 0, "decode_seq_s": 0, "context_token_s": 0}
MODEL = "m"
PATIENCE_S = 60.0
_RSM = [sys.executable, "-c", "from engine.cli import main; main()"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One call."""

    session: str
    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Setup:
    """A system that runs. `stream` gives the text of a call in pieces, and raises if the stream is cut."""

    stream: Callable[[Ask], AsyncIterator[str]]
    running: Callable[[], Mapping[str, int]]  # streams on each engine
    kill: Callable[[str], None]  # kill -9 of one engine


class StreamCut(Exception):
    """The stream ended before its end."""


# -- ours


@asynccontextmanager
async def ours_local(url: str, log: IO[bytes]) -> AsyncIterator[Setup]:
    """Three workers, each with a modelled engine in it."""
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
    """Three `openai` workers, each before a server of its own."""
    with sim_servers(log) as servers:
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
        async for piece in call.stream():
            yield piece.text

    return stream


def _our_running(settings: Settings) -> Callable[[], Mapping[str, int]]:
    monitor = Monitor(settings)
    return lambda: {str(e["engine_id"]): int(e["running"]) for e in monitor.engines()}


# -- routers of others, before `rsm sim-server`


@dataclass(frozen=True, slots=True)
class HttpServer:
    """A process that serves HTTP."""

    url: str
    process: Popen[bytes]


@contextmanager
def sim_servers(log: IO[bytes]) -> Iterator[list[HttpServer]]:
    """Three engines behind OpenAI's HTTP API."""
    args = ["--model", MODEL, *(w for name, value in ENGINE_ARGS.items() for w in ("--engine-arg", f"{name}={value}"))]
    with ExitStack() as stack:
        ports = free_ports(ENGINES)
        yield [stack.enter_context(_server([*_RSM, "sim-server", *args], port, log)) for port in ports]


@contextmanager
def _server(command: Sequence[str], port: int, log: IO[bytes], cwd: Path | None = None) -> Iterator[HttpServer]:
    """A server on `port`, which its command is told; it is there once GET /health says so."""
    process = child.spawn([*command, "--port", str(port)], output=log, cwd=cwd)
    try:
        url = f"http://127.0.0.1:{port}"
        _await_health(url, process)
        yield HttpServer(url, process)
    finally:
        process.kill()
        process.wait()


def _await_health(url: str, process: Popen[bytes]) -> None:
    _until(lambda: httpx.get(f"{url}/health", timeout=2), process)


def _until(ask: Callable[[], httpx.Response], process: Popen[bytes]) -> None:
    """Asks until the answer is a good one; RuntimeError if the process ends, or time is up."""
    until = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if ask().is_success:
                return
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"a server did not come up (exit status {process.returncode}): {process.args!r}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


@asynccontextmanager
async def vllm_router(url: str, log: IO[bytes]) -> AsyncIterator[Setup]:
    program = str(python_for("vllm-router").with_name("vllm-router"))
    async with _router([program, "--policy", "consistent_hash"], log) as setup:
        yield setup


@asynccontextmanager
async def sglang_router(url: str, log: IO[bytes]) -> AsyncIterator[Setup]:
    command = [str(python_for("sglang-router")), "-m", "sglang_router.launch_router", "--policy", "cache_aware"]
    async with _router(command, log) as setup:
        yield setup


@asynccontextmanager
async def _router(command: Sequence[str], log: IO[bytes]) -> AsyncIterator[Setup]:
    port, metrics_port = free_ports(2)
    with sim_servers(log) as servers:
        by_url = {server.url: server for server in servers}
        options = [
            "--host",
            "127.0.0.1",
            "--prometheus-port",
            str(metrics_port),
            "--worker-startup-check-interval",
            "1",
        ]
        with _server([*command, *options, "--worker-urls", *by_url], port, log, Path("/tmp")) as router:  # noqa: S108
            # A router is well before it knows its engines.
            first = {"model": MODEL, "prompt": "Are you there?", "max_tokens": 1}
            _until(lambda: httpx.post(f"{router.url}/v1/completions", json=first, timeout=5), router.process)
            async with httpx.AsyncClient(base_url=router.url, timeout=PATIENCE_S) as client:
                yield Setup(
                    _http_stream(client),
                    lambda: {name: _running(name) for name in by_url},
                    lambda name: by_url[name].process.kill(),
                )


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
    """Text of one event of a stream of completions, and whether it is the last.

    Raises:
        StreamCut: it is an error.
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
    """One line of the comparison. `package`: whose version is shown, from the environment `venv` ("" = this one)."""

    name: str
    package: str
    venv: str
    engines: str
    run: Any

    def version(self) -> str:
        if not self.venv:
            return version(self.package)
        code = f"from importlib.metadata import version; print(version({self.package!r}))"
        done = subprocess.run([python_for(self.venv), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.strip()


SYSTEMS = (
    System("rsm-engine", "rsm-engine", "", "3 workers with modelled engines; one is killed", ours_local),
    System("rsm-engine", "rsm-engine", "", "3 `openai` workers before 3 servers; a server is killed", ours_remote),
    System("vllm-router", "vllm-router", "vllm-router", "the same 3 servers; one is killed", vllm_router),
    System("sglang-router", "sglang-router", "sglang-router", "the same 3 servers; one is killed", sglang_router),
)
