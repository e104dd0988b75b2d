"""Servers as processes of their own: `rsm sim-server`, and the routers of others that stand before several of them."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import IO, Any

import httpx

from bench.venvs import python_for
from rsm.broker import child_process as child

MODEL = "m"
PATIENCE_S = 60.0
RSM = [sys.executable, "-c", "from rsm.cli import main; main()"]


@dataclass(frozen=True, slots=True)
class HttpServer:
    """A process that serves HTTP."""

    url: str
    process: Popen[bytes]


@contextmanager
def sim_servers(
    count: int, engine_args: Mapping[str, Any], log: IO[bytes], slots: int = 256
) -> Iterator[list[HttpServer]]:
    """So many engines of one kind behind OpenAI's HTTP API, each of which runs `slots` calls at once."""
    command = [*RSM, "sim-server", "--model", MODEL, "--max-num-seqs", str(slots)]
    command += [word for name, value in engine_args.items() for word in ("--engine-arg", f"{name}={value}")]
    with ExitStack() as stack:
        # All begin to load before the first is waited for.
        servers = [stack.enter_context(_process(command, port, log)) for port in free_ports(count)]
        for server in servers:
            _await_health(server)
        yield servers


@contextmanager
def router(command: Sequence[str], servers: Sequence[HttpServer], log: IO[bytes]) -> Iterator[HttpServer]:
    """One of the routers below, with further options, before these servers. It is up once it has passed a call on."""
    port, metrics_port = free_ports(2)
    options = ["--host", "127.0.0.1", "--prometheus-port", str(metrics_port), "--worker-startup-check-interval", "1"]
    urls = [server.url for server in servers]
    with _process([*command, *options, "--worker-urls", *urls], port, log, Path("/tmp")) as found:  # noqa: S108
        _await_health(found)
        # A router is well before it knows its engines.
        first = {"model": MODEL, "prompt": "Are you there?", "max_tokens": 1}
        _until(lambda: httpx.post(f"{found.url}/v1/completions", json=first, timeout=5), found.process)
        yield found


def vllm_router(policy: str) -> list[str]:
    return [str(python_for("vllm-router").with_name("vllm-router")), "--policy", policy]


def sglang_router(policy: str) -> list[str]:
    return [str(python_for("sglang-router")), "-m", "sglang_router.launch_router", "--policy", policy]


@contextmanager
def _process(command: Sequence[str], port: int, log: IO[bytes], cwd: Path | None = None) -> Iterator[HttpServer]:
    """A server on `port`, which its command is told."""
    process = child.spawn([*command, "--port", str(port)], output=log, cwd=cwd)
    try:
        yield HttpServer(f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.wait()


def _await_health(server: HttpServer) -> None:
    _until(lambda: httpx.get(f"{server.url}/health", timeout=2), server.process)


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
