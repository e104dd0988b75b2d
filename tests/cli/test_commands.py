"""The `rsm` command in processes of its own, against a real `rsm up` with modelled engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rsm.broker import Client, RequestState, Settings
from rsm.broker.connection.factory import connect
from rsm.broker.views.monitor import Monitor
from tests.support.nodes.process import await_listening
from tests.support.rsm_command import RSM, Deployment, clean_env, run, typed
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(240)

# Steps of 20 ms.
_OPTIONS = ("--max-num-seqs", "4", "--engine-arg", "step_s=0.02")


@pytest.fixture(scope="module")
def up() -> Iterator[Deployment]:
    deployment = Deployment("cli", "--engines", "2", *_OPTIONS)
    try:
        deployment.up("e0", "e1")
        yield deployment
    finally:
        deployment.clean_up()


@pytest.fixture
def client(up: Deployment) -> Iterator[Client]:
    with Client(settings=up.settings) as made:
        yield made


def running(client: Client, call_id: str) -> bool:
    return client.record(call_id).state is RequestState.RUNNING


def test_submit_prints_the_text(up: Deployment) -> None:
    plain = up.rsm("submit", "hello there", "--max-tokens", "6", "--temperature", "0")
    assert len(plain.split()) == 6
    assert up.rsm("submit", "hello there", "--max-tokens", "6", "--stream") == plain
    chat = up.rsm("submit", "-", "--chat", "--stream", "--max-tokens", "5", text="from stdin")
    assert len(chat.split()) == 5


def test_submit_json_and_call(up: Deployment) -> None:
    done = up.json("submit", "secret prompt", "--id", "j1", "--session", "s1", "--max-tokens", "3", "--priority", "-2")
    assert (done["request_id"], done["session_id"], done["state"], done["priority"]) == ("j1", "s1", "COMPLETED", -2)
    assert done["result"]["completion_tokens"] == 3
    assert up.json("call", "j1") == done
    shown = up.rsm("call", "j1")
    assert "least loaded" in shown
    assert "COMPLETED" in shown
    assert "secret" not in shown + str(done)


def test_submit_passes_on_engine_loss(up: Deployment, client: Client) -> None:
    """The default is not stored."""
    stored: Any = client.redis
    for choice, kept in (("restart", b"restart"), ("fail", b"fail"), ("continue", None)):
        up.rsm("submit", "x", "--id", f"loss-{choice}", "--max-tokens", "1", "--on-engine-loss", choice)
        assert stored.hget(client.keys.call(f"loss-{choice}"), "on_engine_loss") == kept
    up.rsm("submit", "x", "--on-engine-loss", "nonsense", status=2)


def test_a_failed_call_is_one_message_and_status_1(up: Deployment) -> None:
    assert "no_engine_for_model" in up.rsm("submit", "x", "--model", "nope", status=1)
    assert "deadline_exceeded" in up.rsm("submit", "x", "--max-tokens", "5000", "--timeout", "0.5", status=1)
    assert up.json("submit", "x", "--model", "nope", status=1)["error_code"] == "no_engine_for_model"
    assert "There is no call nix." in up.rsm("call", "nix", status=1)
    assert typed([RSM, "submit", "x", "--model", "nope"], up.env).startswith("Call "), "no blank line before"


def test_ctrl_c_cancels_the_call(up: Deployment, client: Client) -> None:
    command = [RSM, "submit", "x", "--id", "ctrl-c", "--max-tokens", "5000", "--stream"]
    process = subprocess.Popen(command, env=up.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Call ctrl-c cancelled." in errors
    record = client.record("ctrl-c")
    assert record.state is RequestState.CANCELLED
    assert record.result is not None
    assert record.result.text


def test_tables_show_the_current_state(up: Deployment, client: Client) -> None:
    handles = [client.submit("x", id=f"t{i}", session="tab", max_tokens=5000) for i in range(14)]
    eventually(lambda: sum(running(client, h.id) for h in handles) >= 8)
    calls = up.json("ps")
    assert {c["request_id"] for c in calls} == {h.id for h in handles}
    assert {c["where"] for c in calls} == {"running", "queue"}
    assert "tab" in up.rsm("ps")
    assert "not yet routed" in up.rsm("ps", "--limit", "3")
    engines = {e["engine_id"]: e for e in up.json("engines")}
    assert {e["state"] for e in engines.values()} == {"READY"}
    assert sum(e["running"] + e["queued"] for e in engines.values()) == 14
    assert "sim-8b" in up.rsm("engines")
    assert [s["active"] for s in up.json("sessions") if s["session_id"] == "tab"] == [14]
    assert "tab" in up.rsm("sessions")
    stats = up.json("stats")
    assert stats["unaccounted"] == 0
    assert "submitted" in up.rsm("stats")

    assert "Call t0" in up.rsm("cancel", "t0", "--reason", "enough")
    assert "13 calls of session tab cancelled." in up.rsm("cancel", "--session", "tab")
    assert {h.wait(20).state for h in handles} == {RequestState.CANCELLED}
    assert "Call t0 is cancelled." in up.rsm("cancel", "t0"), "it may be repeated"
    assert "no unfinished calls" in up.rsm("cancel", "--session", "tab", status=1)
    assert "There is no call nix." in up.rsm("cancel", "nix", status=1)
    up.rsm("cancel", status=2)


def test_sub_agents_are_shown_and_cancelled_with_their_parent(up: Deployment, client: Client) -> None:
    for i, session in enumerate(("boss", "helper", "helper2")):
        parent = "boss" if i else None
        client.submit("x", id=f"{session}-call", session=session, parent_session=parent, max_tokens=5000)
    eventually(lambda: all(running(client, f"{s}-call") for s in ("boss", "helper", "helper2")))
    rows = {s["session_id"]: s for s in up.json("sessions")}
    assert [rows[s]["parent"] for s in ("boss", "helper", "helper2")] == ["", "boss", "boss"]
    assert rows["helper"]["program"] == "boss"
    assert rows["helper"]["engines"] == [rows["helper"]["threads"][0]["engine_id"]] != [""]
    assert "is an ancestor of helper" in up.rsm("submit", "x", "--session", "boss", "--parent", "helper", status=1)
    assert "1 call of session helper cancelled." in up.rsm("cancel", "--session", "helper", "--alone")
    assert "2 calls of session boss cancelled." in up.rsm("cancel", "--session", "boss")
    eventually(lambda: not any(running(client, f"{s}-call") for s in ("boss", "helper", "helper2")))


def test_watch_refreshes_until_ctrl_c(up: Deployment) -> None:
    command = [RSM, "ps", "--watch"]
    process = subprocess.Popen(command, env=up.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.5)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")
    assert "running" in out
    up.rsm("ps", "--watch", "--json", status=2)


def test_redis_cli_is_a_client(up: Deployment) -> None:
    """What `rsm up` suggests to try."""
    server: Any = connect(up.settings)
    try:
        entry = {"id": "c1", "session": "s1", "json": '{"prompt":"hi","max_tokens":8}'}
        server.xadd("{rsm}:calls", entry)
        eventually(lambda: server.hget("{rsm}:call:c1", "state") == b"COMPLETED")
        assert b'"text":' in server.hget("{rsm}:call:c1", "result")
    finally:
        server.close()
    log = up.log.read_text()
    assert f"-s {up.folder}/redis.sock XADD '{{rsm}}:calls' '*' id c1 session s1 json '{{\"prompt\":\"hi\"" in log
    assert "their text is meaningless" in log
    for process in ("router ", "e0 ", "e1 ", "up "):
        assert f" {process}" in log


def test_doctor_finds_no_problem(up: Deployment) -> None:
    report = up.json("doctor")
    assert report["healthy"], report
    assert {c["name"]: c["status"] for c in report["checks"] if c["name"] != "dead letters"} == dict.fromkeys(
        [
            "redis",
            "version",
            "persistence",
            "replication",
            "memory",
            "usage",
            "clock",
            "scripts",
            "routers",
            "backlog",
            "engines",
        ],
        "ok",
    )
    assert "problem" not in up.rsm("doctor")
    other = up.rsm("doctor", "--namespace", "nobody", status=1)
    assert "rsm router" in other


def test_a_killed_engine_leaves_a_letter_that_can_be_replayed() -> None:
    up = Deployment("dead", *_OPTIONS, RSM_MAX_DEATHS="2")
    try:
        up.up("e0")
        with Client(settings=up.settings) as client:
            _kill_and_replay(up, client)
    finally:
        up.clean_up()


def _kill_and_replay(up: Deployment, client: Client) -> None:
    assert up.json("dead", "ls") == []
    handle = client.submit("to be killed", id="victim", max_tokens=150)
    for _ in range(2):
        eventually(lambda: running(client, "victim"))
        os.kill(Monitor(up.settings).engine("e0")["pid"], signal.SIGKILL)
        eventually(lambda: not running(client, "victim"))
    assert handle.wait(20).error_code == "attempts_exhausted"
    (letter,) = up.json("dead", "ls")
    assert (letter["request_id"], letter["attempts"], letter["replayable"]) == ("victim", 2, True)
    shown = up.rsm("dead", "show", "victim") + up.rsm("dead", "show", letter["entry"]) + up.rsm("dead", "ls")
    assert "attempts_exhausted" in shown
    assert "to be killed" not in shown
    eventually(lambda: up.is_ready("e0"), what="the supervisor restarts it")

    again = up.rsm("dead", "replay", "victim", "--now").split()[-1].rstrip(".")
    assert again == f"victim.replay-{letter['entry']}"
    result = client.result(again, 30)
    assert result.completion_tokens == 150
    assert up.json("dead", "ls") == []
    assert "There is no dead letter victim" in up.rsm("dead", "replay", "victim", "--now", status=1)
    assert "0 calls submitted again." in up.rsm("dead", "replay", "--all", "--now")
    assert "add --now to replay from here" in up.rsm("dead", "replay", "victim", status=1)
    up.rsm("dead", "replay", status=2)


def test_drain_moves_waiting_calls_and_stop_ends_the_worker(up: Deployment, client: Client) -> None:
    handles = [client.submit("x", session="drain", max_tokens=60) for _ in range(20)]
    assert "takes no new calls" in up.rsm("drain", "e1")
    assert {e["engine_id"]: e["state"] for e in up.json("engines")}["e1"] == "DRAINING"
    assert {h.wait(60).state for h in handles} == {RequestState.COMPLETED}
    assert up.json("submit", "x", "--max-tokens", "2")["engine_id"] == "e0"
    assert "has stopped" in up.rsm("stop", "e1")
    assert "no live engine e1" in up.rsm("drain", "e1", status=1)
    assert {e["engine_id"]: e["state"] for e in up.json("engines")} == {"e0": "READY", "e1": "STOPPED"}


def test_ctrl_c_drains_and_leaves_no_process() -> None:
    up = Deployment("one", "--engines", "1", *_OPTIONS)
    try:
        up.up("e0")
        with Client(settings=up.settings) as client:
            handle = client.submit("x", id="last", max_tokens=60, stream=True)
            eventually(lambda: running(client, "last"))
            up.interrupt()
            assert handle.result(20).completion_tokens == 60  # it may finish
        assert up.gone() == 0
        assert "does not answer" in up.rsm("ps", status=2)
    finally:
        up.clean_up()


def test_a_second_ctrl_c_stops_at_once_and_no_call_is_lost() -> None:
    up = Deployment("two", "--engines", "2", *_OPTIONS, RSM_LEASE_MS="1000")
    try:
        up.up("e0", "e1")
        with Client(settings=up.settings) as client:
            client.submit("x", id="survivor", max_tokens=1000)
            eventually(lambda: running(client, "survivor"))
        up.interrupt()
        eventually(lambda: "stopping: running calls have" in up.log.read_text())
        up.interrupt()
        assert up.gone(10) == 0

        up.options = ("--engines", "1")
        up.up("e0")
        with Client(settings=up.settings) as client:
            assert client.result("survivor", 60).completion_tokens == 1000
            assert client.record("survivor").attempt > 1
        up.interrupt(signal.SIGTERM)
        assert up.gone() == 0
    finally:
        up.clean_up()


def test_up_explains_what_is_wrong() -> None:
    up = Deployment("bad")
    try:
        assert "base_url" in up.rsm("up", "--backend", "openai", status=2)
        assert "backend" in up.rsm("up", "--backend", "nope", status=2)
        assert "NAME=VALUE" in up.rsm("up", "--backend", "sim", "--engine-arg", "x", status=1)
        assert "e0 did not start" in up.rsm("up", "--backend", "sim", "--engine-arg", "nope=1", status=1)
        refused = up.rsm("up", "--redis", "redis://user:geheim@127.0.0.1:1/0", status=2)
        assert "redis://127.0.0.1:1/0" in refused
        assert "geheim" not in refused
    finally:
        up.clean_up()


# -- one process at a time, as compose, systemd and Kubernetes start them


@contextmanager
def process(settings: Settings, *args: str, log: Path) -> Iterator[None]:
    """One `rsm` process. It must end in order on SIGTERM."""
    with log.open("ab") as output:
        started = subprocess.Popen([RSM, *args], env=_env(settings), stdout=output, stderr=output)
    try:
        yield
    finally:
        started.terminate()
        assert started.wait(30) == 0, log.read_text()


def _env(settings: Settings) -> dict[str, str]:
    return clean_env() | settings.environment()


def test_router_and_workers_as_single_processes(settings: Settings, tmp_path: Path) -> None:
    log = tmp_path / "log"
    sim = ("--backend", "sim", "--max-num-seqs", "2", "--engine-arg", "instant=true")
    with (
        process(settings, "router", log=log),
        process(settings, "worker", "--engine-id", "w1", *sim, log=log),
        process(settings, "worker", "--engine-id", "w2", "--supervised", *sim, log=log),
        Client(settings=settings) as client,
    ):
        eventually(lambda: len(ready(settings)) == 2)
        assert {client.submit("x", max_tokens=2).result(20).engine_id for _ in range(4)} == {"w1", "w2"}
        taken = run("worker", "--engine-id", "w1", *sim, env=_env(settings))
        assert "is taken by a live worker" in taken.stderr
        assert taken.returncode == 75


def test_an_engine_that_failed_to_start_is_listed_with_its_error(settings: Settings, tmp_path: Path) -> None:
    """The engine that ended in order is not."""
    with process(settings, "worker", "--engine-id", "w1", "--backend", "sim", log=tmp_path / "log"):
        eventually(lambda: ready(settings) == ["w1"])
    wrong = run("worker", "--engine-id", "w2", "--backend", "sim", "--engine-arg", "nope=1", env=_env(settings))
    assert (wrong.returncode, "do not fit backend sim" in wrong.stderr) == (78, True)
    error = "engine_args of w2 do not fit backend sim: "
    _, row, below, hidden = typed([RSM, "engines"], _env(settings)).splitlines()
    assert row.split()[:2] == ["w2", "STOPPED"]
    assert below.startswith(f"  {error}")
    assert hidden == "Not shown: 1 stopped; --all shows them."
    found = {e["engine_id"]: e for e in json.loads(run("engines", "--json", env=_env(settings)).stdout)}
    assert found["w1"]["error"] == ""
    assert found["w2"]["error"].startswith(error)
    (wide,) = [line for line in run("engines", env=_env(settings)).stdout.splitlines() if line.startswith("w2 ")]
    assert wide.endswith(found["w2"]["error"])


def test_engines_on_a_node(settings: Settings, tmp_path: Path) -> None:
    env = _env(settings)
    with process(settings, "node", "--name", "here", log=tmp_path / "log"):
        nobody = run("start", "--node", "there", "--engine-id", "n1", "--backend", "sim", env=env)
        assert nobody.returncode == 1
        assert "Node there is not listening" in nobody.stderr
        assert "start `rsm node --name there` on that host." in " ".join(nobody.stderr.split())
        replay = run("dead", "replay", "--all", "--node", "there", env=env)
        assert (replay.returncode, "Node there is not listening" in replay.stderr) == (1, True)
        await_listening(settings, "here")
        started = run("start", "--node", "here", "--engine-id", "n1", "--backend", "sim", "--timeout", "30", env=env)
        assert (started.returncode, started.stderr) == (0, "")
        assert "n1 is READY on here" in started.stdout
        again = run("start", "--node", "here", "--engine-id", "n1", "--backend", "sim", env=env)
        assert (again.returncode, "in use" in again.stderr) == (1, True)
        stopped = run("stop", "n1", "--node", "here", env=env)
        assert (stopped.returncode, stopped.stderr) == (0, "")
        assert ready(settings) == []


def ready(settings: Settings) -> list[str]:
    server = connect(settings)
    try:
        return [e["engine_id"] for e in Monitor(settings, server).engines() if e["state"] == "READY"]
    finally:
        server.close()
