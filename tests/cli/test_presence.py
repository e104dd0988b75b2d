"""`rsm submit` whose reader goes away: the call must not continue unread."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rsm.broker import Client, RequestState
from rsm.broker.errors import UnknownCall
from tests.support.rsm_command import RSM, Deployment, on_a_terminal
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(120)


@contextmanager
def submitting(up: Deployment, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Submits a call that takes many minutes."""
    command = [RSM, "submit", "a long story", "--max-tokens", "50000", *options]
    process = subprocess.Popen(command, env=up.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit status and stderr."""
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    return process.wait(20), errors


def state(client: Client, call_id: str) -> RequestState | None:
    try:
        return client.record(call_id).state
    except UnknownCall:
        return None


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("form", ["--stream", "--json"])
def test_a_signal_cancels_the_call(standing: Deployment, producer: Client, number: int, status: int, form: str) -> None:
    call_id = f"signal-{number}{form}"
    with submitting(standing, form, "--id", call_id) as process:
        eventually(lambda: state(producer, call_id) is RequestState.RUNNING)
        process.send_signal(number)
        process.send_signal(number if number != signal.SIGINT else 0)  # as `timeout` does, to child and group
        assert ended(process) == (status, f"Call {call_id} cancelled.\n")
    assert state(producer, call_id) is RequestState.CANCELLED


def test_a_reader_that_leaves_cancels_the_stream(standing: Deployment, producer: Client) -> None:
    """`rsm submit --stream … | head -c 8`."""
    with submitting(standing, "--stream", "--id", "reader") as process:
        assert process.stdout is not None
        assert len(process.stdout.read(8)) == 8
        process.stdout.close()
        assert ended(process) == (141, "")
    assert state(producer, "reader") is RequestState.CANCELLED


@pytest.mark.parametrize("form", ["--stream", "--no-stream", "--json"])
def test_a_reader_that_leaves_is_noticed_before_anything_is_printed(
    standing: Deployment, producer: Client, form: str
) -> None:
    """This namespace has no router, so the call waits and nothing is printed."""
    with (
        Client(settings=standing.settings, namespace="nobody") as other,
        submitting(standing, form, "--namespace", "nobody", "--id", f"waits{form}") as process,
    ):
        eventually(lambda: state(other, f"waits{form}") is RequestState.PENDING)
        assert process.stdout is not None
        process.stdout.close()
        status, errors = ended(process)
        assert status == 141
        assert "is cancelled" not in errors
        assert state(other, f"waits{form}") is RequestState.CANCELLED


def test_a_terminal_that_closes_cancels_the_call(standing: Deployment, producer: Client) -> None:
    process, terminal = on_a_terminal([RSM, "submit", "x", "--max-tokens", "50000", "--id", "terminal"], standing.env)
    try:
        eventually(lambda: state(producer, "terminal") is RequestState.RUNNING)
    finally:
        os.close(terminal)
    assert process.wait(20) == 129
    assert state(producer, "terminal") is RequestState.CANCELLED


def test_nohup_is_respected(standing: Deployment, producer: Client) -> None:
    """A command under nohup continues when its terminal closes."""
    command = ["nohup", RSM, "submit", "x", "--max-tokens", "100", "--id", "nohup", "--no-stream"]
    process = subprocess.Popen(command, env=standing.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    eventually(lambda: state(producer, "nohup") is RequestState.RUNNING)
    process.send_signal(signal.SIGHUP)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(printed.split()) == 100


def test_a_full_disk_cancels_the_stream(standing: Deployment, producer: Client) -> None:
    with open("/dev/full", "w") as full:
        command = [RSM, "submit", "x", "--max-tokens", "50000", "--stream", "--id", "full"]
        done = subprocess.run(
            command, env=standing.env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (1, "Standard output cannot be written: No space left on device.\n")
    assert state(producer, "full") is RequestState.CANCELLED


def test_a_watch_without_a_reader_ends(standing: Deployment) -> None:
    process = subprocess.Popen([RSM, "ps", "--watch"], env=standing.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert ended(process) == (141, "")
    assert process.stderr is not None
    process.stderr.close()
