"""Log lines of real processes: levels, JSON, and no lines for HTTP requests."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from rsm.broker import Client, Settings
from rsm.broker.connection.factory import connect
from rsm.broker.views.monitor import Monitor
from tests.support.rsm_command import RSM, Deployment, clean_env
from tests.support.sim_processes import state_of
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(120)

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\S+) +(DEBUG|INFO|WARNING|ERROR|CRITICAL) +\S+ .+")


@contextmanager
def process(log: Path, *command: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose stderr goes to the log. It ends in order on SIGTERM."""
    with log.open("ab") as errors:
        started = subprocess.Popen([RSM, *command], env=clean_env() | env, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        assert started.wait(40) == 0, log.read_text()


def objects(log: Path) -> list[dict[str, Any]]:
    """The log as JSON. Fails if a line is not a JSON object."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def run_up(log: Path, folder: Path, **env: str) -> None:
    """Runs `rsm up` until its engine is ready."""
    with process(log, "up", "--backend", "sim", RSM_DATA_DIR=str(folder), **env):
        eventually(lambda: "e0 is ready" in log.read_text(), 40)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, because a socket is in it."""
    deployment = Deployment("logs")
    yield deployment.folder
    deployment.clean_up()


def test_every_process_logs_one_json_object_per_line(tmp_path: Path, folder: Path) -> None:
    log = tmp_path / "log"
    run_up(log, folder, RSM_LOG_FORMAT="json", RSM_NOSUCH="1")
    lines = objects(log)
    assert {line["process"] for line in lines} == {"up", "router", "e0"}
    for line in lines:
        assert list(line)[:5] == ["time", "level", "process", "logger", "message"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert {line["level"] for line in lines} == {"INFO", "WARNING"}
    warned = {line["process"] for line in lines if "RSM_NOSUCH is not a setting" in line["message"]}
    assert warned == {"up", "router", "e0"}, "these lines are logged before the format is known"


def test_text_lines_have_a_level(tmp_path: Path, folder: Path) -> None:
    log = tmp_path / "log"
    run_up(log, folder, RSM_NOSUCH="1")
    found = [LINE.fullmatch(line) for line in log.read_text().splitlines()]
    assert all(found), log.read_text()
    assert {(m[1], m[2]) for m in found if m} == {(p, v) for p in ("up", "router", "e0") for v in ("INFO", "WARNING")}


def test_the_log_level_is_respected(tmp_path: Path, settings: Settings) -> None:
    env = settings.environment()
    log = tmp_path / "log"
    with process(log, "worker", "--engine-id", "w1", "--backend", "sim", "--log-level", "ERROR", **env):
        eventually(lambda: state_of(Monitor(settings), "w1") == "READY")
    assert log.read_text() == ""
    monitor = Monitor(settings)
    with process(log, "router", **env | {"RSM_LOG_LEVEL": "error", "RSM_NOSUCH": "1"}), connect(settings) as server:
        eventually(lambda: server.zcard(monitor.keys.routers))
    assert log.read_text() == ""


def test_a_node_logs_json(tmp_path: Path, settings: Settings) -> None:
    log = tmp_path / "log"
    with process(log, "node", "--name", "here", **settings.environment() | {"RSM_LOG_FORMAT": "json"}):
        eventually(lambda: "here" in log.read_text())
    assert {line["process"] for line in objects(log)} == {"node"}


def test_a_fatal_error_is_a_json_line(tmp_path: Path, settings: Settings) -> None:
    env = clean_env() | settings.environment() | {"RSM_LOG_FORMAT": "json"}
    command = [RSM, "worker", "--engine-id", "w1", "--backend", "sim", "--engine-arg", "nope=1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["level"], line["process"]) == ("ERROR", "w1")
    wrong = env | {"RSM_REDIS_URL": "unix:///nowhere"}
    done = subprocess.run([RSM, "node"], env=wrong, capture_output=True, text=True, timeout=60, check=False)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["level"], line["process"], "unix:///nowhere" in line["message"]) == ("ERROR", "node", True)
    answer = subprocess.run([RSM, "call", "nix"], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert answer.stderr == "There is no call nix.\n", "a message to a person is not a log line"


def test_a_crash_is_a_json_line(tmp_path: Path) -> None:
    code = (
        "from rsm.broker import Settings, logs\n"
        "import warnings\n"
        "logs.configure(Settings(), 'p')\n"
        "warnings.warn('mind the gap')\n"
        "raise RuntimeError('unforeseen')\n"
    )
    env = clean_env() | {"RSM_LOG_FORMAT": "json"}
    python = Path(RSM).with_name("python")
    done = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    warning, crash = map(json.loads, done.stderr.splitlines())
    assert "mind the gap" in warning["message"]
    assert (warning["level"], crash["level"]) == ("WARNING", "CRITICAL")
    assert crash["exception"].endswith("RuntimeError: unforeseen")


def test_http_requests_are_not_logged(tmp_path: Path, settings: Settings) -> None:
    server_log, log = tmp_path / "server", tmp_path / "worker"
    with process(server_log, "sim-server", "--port", "0", "--model", "remote", RSM_LOG_LEVEL="INFO") as server:
        url = f"http://127.0.0.1:{port_of(server)}/v1"
        openai = ["worker", "--engine-id", "o1", "--backend", "openai", "--model", "remote", "--base-url", url]
        with (
            process(log, *openai, **settings.environment() | {"RSM_LOG_LEVEL": "INFO"}),
            process(tmp_path / "router", "router", **settings.environment()),
            Client(settings=settings) as client,
        ):
            assert client.submit("x", max_tokens=3).result(40).engine_id == "o1"
    assert "o1 is ready" in log.read_text()
    for quiet in ("HTTP Request", "httpx", "httpcore", "POST"):
        assert quiet not in log.read_text() + server_log.read_text()


def port_of(server: subprocess.Popen[bytes]) -> int:
    def listening() -> list[int]:
        return [c.laddr.port for c in psutil.Process(server.pid).net_connections("inet") if c.status == "LISTEN"]

    eventually(listening)
    return listening()[0]
