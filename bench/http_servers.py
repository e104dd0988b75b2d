"""Server processes for benchmarks: `rsm sim-server`, and third-party routers in front of several of them."""

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
    """Starts `count` equal engines behind OpenAI's HTTP API; each runs up to `slots` calls at once."""
    command = [*RSM, "sim-server", "--model", MODEL, "--max-num-seqs", str(slots)]
    command += [word for name, value in engine_args.items() for word in ("--engine-arg", f"{name}={value}")]
    with ExitStack() as stack:
        # Start all of them before waiting for the first.
        servers = [stack.enter_context(_process(command, port, log)) for port in free_ports(count)]
        for server in servers:
            _await_health(server)
        yield servers


@contextmanager
def router(command: Sequence[str], servers: Sequence[HttpServer], log: IO[bytes]) -> Iterator[HttpServer]:
    """Starts one of the routers below in front of these servers; it is ready once it has forwarded a call."""
    port, metrics_port = free_ports(2)
    options = ["--host", "127.0.0.1", "--prometheus-port", str(metrics_port), "--worker-startup-check-interval", "1"]
    urls = [server.url for server in servers]
    with _process([*command, *options, "--worker-urls", *urls], port, log, Path("/tmp")) as found:  # noqa: S108
        _await_health(found)
        # A router reports that it is healthy before it knows its engines.
        first = {"model": MODEL, "prompt": "Are you there?", "max_tokens": 1}
        _await_success(lambda: httpx.post(f"{found.url}/v1/completions", json=first, timeout=5), found.process)
        yield found


def vllm_router(policy: str) -> list[str]:
    return [str(python_for("vllm-router").with_name("vllm-router")), "--policy", policy]


def sglang_router(policy: str) -> list[str]:
    return [str(python_for("sglang-router")), "-m", "sglang_router.launch_router", "--policy", policy]


@contextmanager
def _process(command: Sequence[str], port: int, log: IO[bytes], cwd: Path | None = None) -> Iterator[HttpServer]:
    """Runs a server with `--port PORT` until the end of the block."""
    process = child.spawn([*command, "--port", str(port)], output=log, cwd=cwd)
    try:
        yield HttpServer(f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.wait()


def _await_health(server: HttpServer) -> None:
    _await_success(lambda: httpx.get(f"{server.url}/health", timeout=2), server.process)


def _await_success(send: Callable[[], httpx.Response], process: Popen[bytes]) -> None:
    """Repeats a request until it succeeds; RuntimeError if the process ends or the time is up."""
    until = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if send().is_success:
                return
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(
                f"A server did not start within {PATIENCE_S:g} s (exit status {process.returncode}). "
                f"Run its command by hand to see why: {process.args!r}"
            )
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Returns free ports of 127.0.0.1."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]
