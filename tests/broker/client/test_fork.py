"""A client on both sides of a fork: with `multiprocessing`, or in a server that loads the application first."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rsm.broker import AsyncClient, CallHandle, Client, Settings
from tests.support.paths import ROOT
from tests.support.sim_processes import WorkerProcess, sim
from tests.support.waiting import eventually

WAIT_S = 20
# The tests' server threads and clients are idle while we fork; Python warns of any thread at all.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def served(settings: Settings, tmp_path: Path) -> Iterator[Settings]:
    """A namespace with a router and an engine."""
    env = os.environ | settings.environment()
    with (tmp_path / "router.log").open("ab") as log:
        router = subprocess.Popen([sys.executable, "-P", "-m", "rsm.router"], env=env, stdout=log, stderr=log)
    worker = WorkerProcess(sim("e1", step_s=0.002), settings, tmp_path / "e1.log")
    yield settings
    worker.kill()
    router.terminate()
    router.wait()


def in_child(action: Callable[[], Any]) -> Any:
    """The result of `action` in a forked process; fails if there is none."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        signal.alarm(WAIT_S)
        try:
            theirs.send(action())
        except BaseException as e:
            theirs.send(f"{type(e).__name__}: {e}")
        os._exit(0)
    try:
        assert ours.poll(WAIT_S), "the child hangs"
        return ours.recv()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def say(client: Client, text: str = "x") -> str:
    return client.submit(text, max_tokens=3).result(WAIT_S).text


def test_a_client_that_was_used_before_the_fork(served: Settings) -> None:
    with Client(settings=served) as client:
        expected = say(client)
        inbox = client._inbox
        assert [in_child(lambda: say(client)) for _ in range(3)] == [expected] * 3
        assert in_child(lambda: client._inbox) not in (inbox, "", None), "each process has its own inbox"
        assert say(client) == expected, "the parent's connections are its own"


def test_a_handle_of_the_parent_may_be_awaited_in_the_child(served: Settings) -> None:
    with Client(settings=served) as client:
        handle: CallHandle = client.submit("long", max_tokens=400, stream=True)
        words = in_child(lambda: handle.result(WAIT_S).text)
        assert words == handle.result(WAIT_S).text
        assert in_child(lambda: handle.result(1).text) == words, "the end is already known"


def test_a_lock_that_was_held_during_the_fork(served: Settings) -> None:
    with Client(settings=served) as client:
        say(client)
        with client._changed, client._connection_lock:
            assert in_child(lambda: bool(say(client)))


def test_an_asynchronous_client_that_was_made_before_the_fork(served: Settings) -> None:
    client = AsyncClient(settings=served)

    async def call() -> str:
        return (await (await client.submit("x", max_tokens=3)).result(WAIT_S)).text

    first, second = in_child(lambda: asyncio.run(call())), in_child(lambda: asyncio.run(call()))
    assert first == second
    assert "Error" not in first


APPLICATION = textwrap.dedent("""
    from rsm import Client
    client = Client()
    client.record  # made, and used, before the server forks
    client.submit("warm", id="warm", max_tokens=2).result(20)

    def answer() -> bytes:
        return client.submit("x", max_tokens=3).result(20).text.encode()
""")
SERVER = textwrap.dedent("""
    # What gunicorn --preload does: load the application, listen, fork workers that accept.
    import os, signal, socket, sys
    sys.path.insert(0, sys.argv[1])
    import application
    listener = socket.socket(fileno=int(sys.argv[2]))
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            while True:
                connection, _ = listener.accept()
                connection.sendall(str(os.getpid()).encode() + b" " + application.answer())
                connection.close()
        children.append(pid)
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(c, signal.SIGKILL) for c in children] and os._exit(0))
    print("listening", flush=True)
    signal.pause()
""")


def test_an_application_that_is_loaded_before_its_server_forks(served: Settings, tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(APPLICATION)
    (tmp_path / "server.py").write_text(SERVER)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = os.environ | served.environment() | {"PYTHONPATH": path}
        command = [sys.executable, str(tmp_path / "server.py"), str(tmp_path), str(listener.fileno())]
        server = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, pass_fds=[listener.fileno()])
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"listening\n"
            answered: dict[bytes, set[bytes]] = {}

            def ask() -> bool:
                with socket.create_connection(listener.getsockname(), timeout=WAIT_S) as connection:
                    pid, _, text = connection.makefile("rb").read().partition(b" ")
                answered.setdefault(pid, set()).add(text)
                return len(answered) == 2

            eventually(ask, WAIT_S, "both workers have answered")
            assert len({text for texts in answered.values() for text in texts}) == 1
        finally:
            server.terminate()
            server.wait()
            assert server.stdout is not None
            server.stdout.close()
