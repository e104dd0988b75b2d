"""`rsm up`: what it starts, from options and from a file."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rsm.broker import Settings
from rsm.broker.connection.factory import connect
from rsm.broker.protocol.keys import Keys
from rsm.broker.views.monitor import Monitor
from rsm.cli.foreground import Stopping
from tests.support.rsm_command import RSM, Deployment, clean_env, run
from tests.support.sim_http import sim_server
from tests.support.waiting import eventually


@pytest.fixture
def deployment() -> Iterator[Deployment]:
    made = Deployment("up")
    yield made
    made.clean_up()


def test_one_engine_for_each_server(deployment: Deployment) -> None:
    with sim_server(model="first") as one, sim_server(model="second") as other:
        command = [RSM, "up", "--base-url", f"{one.url}/v1", "--base-url", f"{other.url}/v1"]
        with deployment.log.open("ab") as output:
            deployment.process = subprocess.Popen(command, env=deployment.env, stdout=output, stderr=output)
        eventually(lambda: deployment.is_ready("e0") and deployment.is_ready("e1"), 30)
        engines = Monitor(deployment.settings).engines()
        assert [e["model"] for e in engines] == ["first", "second"], "each is asked for its model"
        for model in ("first", "second"):
            answer = deployment.json("submit", "hi", "--model", model, "--max-tokens", "3")
            assert answer["state"] == "COMPLETED"


def test_more_engines_than_servers_are_refused(tmp_path: Path) -> None:
    env = clean_env() | {"RSM_DATA_DIR": str(tmp_path)}
    done = run("up", "--engines", "3", "--backend", "openai", "--base-url", "http://127.0.0.1:1/v1", env=env)
    assert done.returncode == 1
    assert "each server is one engine" in " ".join(done.stderr.split())
    done = run("up", "--backend", "sim", "--base-url", "http://127.0.0.1:1/v1", env=env)
    assert done.returncode == 2
    assert "--base-url is for backend openai" in " ".join(done.stderr.split())


def test_a_fleet_from_a_file(deployment: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "rsm.yaml"
    file.write_text("settings: {namespace: filed}\nengines: [{engine_id: written, backend: sim, max_num_seqs: 3}]\n")
    deployment.settings = deployment.settings.model_copy(update={"namespace": "filed"})
    with deployment.log.open("ab") as output:
        deployment.process = subprocess.Popen(
            [RSM, "--log-level", "WARNING", "up", "--routers", "2"],  # these two go with a file
            env=deployment.env,
            stdout=output,
            stderr=output,
            cwd=tmp_path,
        )
    eventually(lambda: deployment.is_ready("written"), 30)
    assert Monitor(deployment.settings).engine("written")["max_num_seqs"] == 3
    assert "INFO" not in deployment.log.read_text(), "--log-level stands above the file"
    with connect(deployment.settings) as db:
        eventually(lambda: db.zcard(Keys("filed").routers) == 2)
    clash = run("up", "--config", str(file), "--engines", "2", env=deployment.env)
    assert clash.returncode == 2
    assert "leave the other options out" in " ".join(clash.stderr.split())


def test_an_unknown_variable_causes_a_warning(tmp_path: Path) -> None:
    env = clean_env() | {"RSM_DATA_DIR": str(tmp_path), "RSM_ADMISION": "1", "RSM_PROMPT_PIECE": "9", "RSM_TEST_X": "1"}
    said = " ".join(run("doctor", env=env).stderr.split())
    assert "RSM_ADMISION is not a setting of rsm-engine and has no effect: did you mean RSM_ADMISSION?" in said
    assert (
        "RSM_PROMPT_PIECE is not a setting of rsm-engine and has no effect: it is now called RSM_PROMPT_CHUNK." in said
    )
    assert "RSM_TEST_X" not in said


@pytest.mark.timeout(180)
def test_the_demo_on_a_terminal(tmp_path: Path) -> None:
    """Act 4 is shown live: a bar for each stream, and the engine that dies."""
    ours, theirs = pty.openpty()
    env = clean_env() | {"TMPDIR": "/tmp", "TERM": "xterm-256color", "COLUMNS": "110", "LINES": "50"}
    process = subprocess.Popen([RSM, "demo", "--backend", "sim"], env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown, until = b"", time.monotonic() + 150
    while time.monotonic() < until:
        if select.select([ours], [], [], 1)[0]:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:  # the other side has closed it
                break
        elif process.poll() is not None:
            break
    os.close(ours)
    assert process.wait(30) == 0, shown[-3000:].decode(errors="replace")
    text = shown.decode(errors="replace")
    assert "█" in text, "bars"
    assert " → " in text, "a stream that moved from one engine to another"
    assert "kill -9" in text
    assert "rsm up" in text.rpartition("Next, in this folder")[2]


def test_the_commands_that_the_demo_ends_with_work(deployment: Deployment) -> None:
    """Each one as it is printed, except for the folder."""
    from rsm.cli.demo.story import _next_lines

    up, submit, ps = (line.partition(" #")[0].split() for line in _next_lines("sim"))
    assert [words[1] for words in (up, submit, ps)] == ["up", "submit", "ps"]
    deployment.options = tuple(up[2:])
    with deployment.log.open("ab") as output:
        deployment.process = subprocess.Popen([RSM, *up[1:]], env=deployment.env, stdout=output, stderr=output)
    eventually(lambda: deployment.is_ready("e0") and deployment.is_ready("e1"), 30)
    assert deployment.rsm("submit", "hello", "--stream", "--max-tokens", "3").strip()
    assert deployment.rsm(*(word for word in ps[1:] if word != "--watch")).strip()


def test_up_explains_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "rsm.yaml").write_text("engines: [{}]")
    command = [RSM, "up"]
    env = clean_env() | {"RSM_DATA_DIR": str(tmp_path / "d")}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "rsm.yaml does not describe a fleet" in " ".join(done.stderr.split())


class Interrupted:
    """A process that gets a second signal in the midst of its orderly stop, where that holds a lock."""

    pid = None

    def __init__(self) -> None:
        self.stops = 0
        self._lock = threading.Lock()

    def request_stop(self) -> None:
        with self._lock:
            self.stops += 1
            if self.stops == 1:
                signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_in_the_midst_of_a_stop_does_not_block_it() -> None:
    process = Interrupted()
    fleet: Any = SimpleNamespace(workers={"e0": process}, routers=[], settings=Settings(), stop=process.request_stop)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with pytest.raises(KeyboardInterrupt), Stopping(fleet):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    eventually(lambda: process.stops == 2)
