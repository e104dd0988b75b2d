"""Parts of ids, and ids and names that a shell completes."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rsm.broker import Client, InvalidRequest, RequestState, Settings
from rsm.broker.protocol.codec import text
from rsm.broker.protocol.ids import new_id, short_form
from rsm.broker.protocol.keys import Keys
from rsm.broker.views.lookup import Lookup
from tests.support.nodes.process import Node
from tests.support.roles import Roles
from tests.support.rsm_command import RSM, Deployment, clean_env, run, typed

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def lookup(client: Client) -> Lookup:
    return Lookup(client.keys, client.redis)


def test_a_part_names_an_open_call_and_a_finished_one(client: Client, lookup: Lookup) -> None:
    ended, pending = client.submit("x", id="batch-7-first-of-all"), client.submit("x", id="batch-7-second")
    ended.cancel()
    for call, parts in (
        (ended, ("batch-7-first", "first-of-all", "…first-of-all")),
        (pending, ("batch-7-s", "-7-second")),
    ):
        assert {lookup.call(part) for part in (*parts, call.id)} == {call.id}
    with pytest.raises(
        InvalidRequest, match=r"batch-7- matches several calls: batch-7-first-of-all, batch-7-second\. "
    ):
        lookup.call("batch-7-")
    for unknown in ("batch-8-", "second", "no such id", "*", "batch-7-second:events", ""):
        assert lookup.call(unknown) == unknown
    pending.cancel()


def test_a_short_form_names_one_call_even_if_other_ids_end_alike(client: Client, lookup: Lookup) -> None:
    front, process = new_id().rsplit("-", 2)[0], "0123456789"
    ids = [f"{front}-{n:06x}-{process}" for n in (0x3, 0x13, 0x103)]
    calls = [client.submit("x", id=i, session=i) for i in ids]
    assert [lookup.call(short_form(i)) for i in ids] == ids
    assert [lookup.session(short_form(i)) for i in ids] == ids
    assert [lookup.session_of_short_form(short_form(i)) for i in ids] == ids
    with pytest.raises(InvalidRequest, match="0123456789 matches several calls"):
        lookup.call(process)
    assert lookup.session_of_short_form(process) == process, "it may be the name of a new session"
    for call in calls:
        call.cancel()


def test_many_candidates_are_counted(client: Client, lookup: Lookup) -> None:
    calls = [client.submit("x", id=f"candidate-{i}") for i in range(9)]
    with pytest.raises(InvalidRequest, match=r"candidate-4 and 4 more\. Give more of the id"):
        lookup.call("candidate")
    for call in calls:
        call.cancel()


def test_a_part_is_not_a_glob(client: Client, settings: Settings, db: Any) -> None:
    """No namespace and no id holds glob characters, but other keys may."""
    keys = Keys(settings.namespace)
    db.hset(keys.call("good-id-1"), "state", "x")
    db.expire(keys.call("good-id-1"), 60)
    assert Lookup(keys, db).call("good-?d-1") == "good-?d-1"
    assert Lookup(keys, db).call("good-id-") == "good-id-1"


def test_a_user_who_may_not_scan_must_give_whole_ids(roles: Roles, client: Client) -> None:
    call = client.submit("x", id="a-call-by-name")
    with roles.client("producer") as server:
        lookup = Lookup(client.keys, server)
        assert lookup.call("a-call-by-name") == "a-call-by-name"
        assert lookup.call("a-call-by-na") == "a-call-by-na"
    with roles.client("observer") as server:
        lookup = Lookup(client.keys, server)
        assert lookup.call("a-call-by-na") == lookup.session("a-call-by-na") == "a-call-by-name"
        assert list(lookup.finished_calls(10)) == list(lookup.open_calls(10)) == []
    call.cancel()


# -- commands


def test_commands_accept_what_tables_show(standing: Deployment, producer: Client) -> None:
    handle = producer.submit("x", max_tokens=50_000)
    other = producer.submit("x", session="a-conversation-of-long-name", max_tokens=50_000)
    try:
        shown = typed([RSM, "ps"], standing.env)
        rows = {words[0]: words for words in map(str.split, shown.splitlines()[1:]) if len(words) > 3}
        assert rows[short_form(handle.id)][1] == "(own)"
        session = rows[short_form(other.id)][1]
        assert len(session) <= 15
        assert standing.json("call", short_form(handle.id))["request_id"] == handle.id
        assert f"Call {handle.id}" in standing.rsm("cancel", short_form(handle.id))
        assert "1 call of session a-conversation-of-long-name cancelled." in standing.rsm(
            "cancel", "--session", session
        )
        assert {c.wait(20).state for c in (handle, other)} == {RequestState.CANCELLED}
        program = short_form(handle.session)
        again = standing.json("submit", "x", "--session", program, "--max-tokens", "1")
        assert again["session_id"] == handle.session
        assert "matches several calls" in standing.rsm("call", handle.id[:8], status=1)
    finally:
        producer.cancel(handle.id)
        producer.cancel(other.id)


def test_a_dead_letter_by_a_part_of_its_call(standing: Deployment, producer: Client) -> None:
    body = '{"prompt":"a","max_tokens":1}'
    letter: Any = {"id": "a-call-that-died", "error_code": "engine_error", "error": "it died", "json": body}
    producer.redis.xadd(producer.keys.dead, letter)
    assert standing.json("dead", "show", "a-call-that")["request_id"] == "a-call-that-died"
    assert "There is no dead letter that-died-not" in standing.rsm("dead", "show", "that-died-not", status=1)
    assert "Submitted again as a-call-that-died." in standing.rsm("dead", "replay", "call-that-died", "--now")


@contextmanager
def node_at(settings: Settings, folder: Path, name: str) -> Iterator[None]:
    """A node that listens."""
    node = Node(settings, folder / f"{name}.log", name)
    try:
        node.up()
        yield
    finally:
        node.end()


@pytest.mark.parametrize("command", ["drain", "stop"])
def test_an_engine_by_a_part_of_its_id(settings: Settings, client: Client, db: Any, command: str) -> None:
    engines: Any = {"host-1-gpu-0": 1, "host-1-gpu-1": 1}
    db.zadd(client.keys.engines, engines)
    env = clean_env() | settings.environment()
    assert "There is no live engine host-1-gpu-0." in run(command, "host-1-gpu-0", env=env).stderr
    assert "matches several engines: host-1-gpu-0, host-1-gpu-1" in run(command, "host-1-gpu", env=env).stderr
    assert "There is no live engine host-1-gpu-1." in run(command, "…st-1-gpu-1", env=env).stderr


def test_an_engine_on_a_node_by_a_part_of_its_id(settings: Settings, client: Client, db: Any, tmp_path: Path) -> None:
    """The order to the node names the whole id; a part that fits several engines is refused before."""
    engines: Any = {"host-1-gpu-0": 1, "host-1-gpu-1": 1}
    db.zadd(client.keys.engines, engines)
    env = clean_env() | settings.environment()
    with node_at(settings, tmp_path, "here"):
        stop = ("stop", "--node", "here")
        assert "matches several engines" in run(*stop, "host-1-gpu", env=env).stderr
        assert "There is no live engine host-1-gpu-1 to stop." in run(*stop, "…st-1-gpu-1", env=env).stderr


# -- completion


def completed(line: str, env: dict[str, str], options: Sequence[str] = ()) -> list[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_RSM_COMPLETE": "complete_bash"}
    done = subprocess.run([RSM], env=env | asked, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_ids_are_completed(standing: Deployment, producer: Client) -> None:
    env = standing.env
    handle = producer.submit("x", session="completed-session", max_tokens=50_000)
    done = producer.submit("x", id="completed-call", max_tokens=1)
    done.result(20)
    letter: Any = {"id": "completed-letter", "error": "it died", "json": '{"prompt":"a"}'}
    entry = text(producer.redis.xadd(producer.keys.dead, letter))
    try:
        assert set(completed("rsm drain ", env)) == set(completed("rsm stop ", env)) == {"e0", "e1"}
        assert completed("rsm engines --ready e1", env) == ["e1"]
        assert {short_form(handle.id), "completed-call"} <= set(completed("rsm call ", env))
        assert completed("rsm cancel ", env) == [short_form(handle.id)]
        assert completed(f"rsm cancel {handle.id[:16]}", env) == [handle.id]
        assert completed("rsm cancel --session completed-s", env) == ["completed-session"]
        assert completed("rsm submit x --parent completed-s", env) == ["completed-session"]
        assert {entry, "completed-letter"} <= set(completed("rsm dead show ", env))
        assert completed("rsm dead replay completed-", env) == ["completed-letter"]
        assert completed("rsm ps -o ", env) == ["table", "wide", "json"]
        assert completed("rsm call --namespace nobody ", env) == []
    finally:
        handle.cancel()
        producer.redis.xdel(producer.keys.dead, entry)


def test_nodes_are_completed(settings: Settings, tmp_path: Path) -> None:
    env = clean_env() | settings.environment()
    commands = ("rsm start --engine-id e1 --node", "rsm stop e1 --node", "rsm dead replay x --node")
    assert [completed(f"{command} ", env) for command in commands] == [[], [], []]
    with node_at(settings, tmp_path, "rack-7.host-1"), node_at(settings, tmp_path, "rack-8.host-1"):
        for command in commands:
            assert set(completed(f"{command} ", env)) == {"rack-7.host-1", "rack-8.host-1"}
            assert completed(f"{command} rack-8", env) == ["rack-8.host-1"]


def test_at_most_a_hundred_ids_are_offered(client: Client, settings: Settings) -> None:
    calls = [client.submit("x", id=f"many-{i}", session=f"many-{i}") for i in range(130)]
    env = clean_env() | settings.environment()
    assert len(completed("rsm cancel --session ", env)) == 100
    for call in calls:
        call.cancel()
    assert len(completed("rsm call ", env)) == 100


@contextmanager
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            try:
                while True:
                    taken.append(server.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=take)
        thread.start()
        yield f"redis://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for each in taken:
            each.close()


def test_without_redis_nothing_is_offered_and_nobody_waits(tmp_path: Path) -> None:
    for name in ("call", "drain", "stop", "stop e1 --node", "cancel --session", "dead show"):
        assert completed(f"rsm {name} ", clean_env() | {"RSM_DATA_DIR": str(tmp_path)}) == []
    with silent_server() as url:
        env = clean_env() | {"RSM_REDIS_URL": url}
        began = time.monotonic()
        for name in ("call", "stop", "stop e1 --node"):
            assert completed(f"rsm {name} ", env) == []
        # A command's time limit is 10 s. The rest is for starting Python.
        assert time.monotonic() - began < 3 * 9


def test_without_rq_no_nodes_are_offered(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "rq.py").write_text("raise ModuleNotFoundError('rq')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = clean_env() | settings.environment() | {"PYTHONPATH": path}
    assert completed("rsm start --node ", env) == []
    assert "Nodes need RQ, which is not installed" in run("node", env=env).stderr


def test_a_wrong_setting_does_not_disturb_completion() -> None:
    for wrong in ({"RSM_LEASE_MS": "x"}, {"RSM_REDIS_URL": "nonsense"}, {"RSM_NOSUCH": "1"}):
        for name in ("call", "stop e1 --node"):
            assert completed(f"rsm {name} ", clean_env() | {"RSM_DATA_DIR": "/nowhere"} | wrong) == []


def test_completion_can_be_installed(tmp_path: Path) -> None:
    env = clean_env() | {"HOME": str(tmp_path)}
    assert "--install-completion" in run("--help", env=env).stdout
    assert "_RSM_COMPLETE=complete_bash" in run("--show-completion", "bash", env=env).stdout
