"""One Redis user per role: each process does its work with its own user, and everything else is denied."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from rsm.broker import AccessDenied, AsyncClient, CallCancelled, Client, RequestState, Settings
from rsm.broker.connection import execute
from rsm.broker.connection.embedded import find_server
from rsm.broker.connection.failover import Denied
from rsm.broker.protocol.acl import LOCKED, ROLES, acl_file, user_name
from rsm.broker.protocol.keys import Keys
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.monitor import Monitor
from rsm.cli.checks import examine
from rsm.cli.commands.drain import order_drain
from rsm.engine.seed_api.lifecycle import RequestLifecycleManager
from rsm.engine.seed_api.process_table import GlobalProcessTable, SessionManager
from rsm.router.affinity import KVCacheCoordinator
from rsm.router.router import Router
from rsm.workers.supervision.node import NodeClient
from tests.support.fake_worker import FakeWorker
from tests.support.nodes.process import await_listening
from tests.support.paths import LUA, ROOT
from tests.support.roles import Roles, secret
from tests.support.rsm_command import RSM, clean_env, run
from tests.support.sim_processes import WorkerProcess, processes_of, sim, state_of
from tests.support.waiting import eventually
from tests.support.world import World


@pytest.fixture
def worker_process(roles: Roles, tmp_path: Path) -> Iterator[WorkerProcess]:
    """A router and a worker as processes with their own users. Returns the worker."""
    env = clean_env() | roles.settings("router").environment()
    with (tmp_path / "router.log").open("ab") as log:
        router = subprocess.Popen([sys.executable, "-P", "-m", "rsm.router"], env=env, stdout=log, stderr=log)
    worker = WorkerProcess(sim(), roles.settings("worker"), tmp_path / "worker.log")
    yield worker
    for process in (worker, router):
        process.kill()
    router.wait()


async def test_the_main_job_works_with_each_process_under_its_own_user(
    roles: Roles, worker_process: WorkerProcess, settings: Settings, db: redis.Redis
) -> None:
    monitor = Monitor(roles.settings("observer"))
    eventually(lambda: state_of(monitor, "e1") == "READY")
    with Client(settings=roles.settings("producer")) as client:
        produce(client)
        async with AsyncClient(settings=roles.settings("producer")) as other:
            call = await other.submit("hi", stream=True, max_tokens=4)
            assert [d.text async for d in call.stream()]
            assert (await call.result(20)).completion_tokens == 4
        assert push(roles, settings)["text"]
        view(roles, monitor, client)
        assert "Traceback" not in worker_process.log()
        drain(roles, worker_process)
    # What `rsm doctor` cannot do for an observer, and says so.
    assert [r for r in roles.refusals() if "-observer command script|load" not in r] == []


def produce(client: Client) -> None:
    """What a producer does, except with the process table."""
    call = client.submit("hi", session="s1", stream=True, max_tokens=4)
    assert [d.text for d in call.stream()]
    assert call.result(20).completion_tokens == 4
    assert client.result(call.id).text == call.result().text
    assert client.submit("late", deadline_ms=1).wait(20).error_code == "deadline_exceeded"
    endless = [client.submit("x", session="s2", stream=True, max_tokens=100_000) for _ in range(3)]
    eventually(lambda: all(c.record().state is RequestState.RUNNING for c in endless))
    assert endless[0].cancel("enough")
    assert client.cancel_session("s2") == 2
    for each in endless:
        with pytest.raises(CallCancelled):
            each.result(20)
    table = GlobalProcessTable(client.settings)
    with SessionManager(table) as session:
        table.update_program_metrics(session, call.id, 5, 1)
    life = RequestLifecycleManager(client.settings)
    life.start_request("mine", "s3", "e9")
    for state in (RequestState.RUNNING, RequestState.COMPLETED):
        life.update_request_state("mine", state)


def push(roles: Roles, settings: Settings) -> dict[str, Any]:
    """A program that uses only XADD and HGETALL."""
    keys = Keys(settings.namespace)
    with roles.client("pusher") as pusher:
        pusher.xadd(keys.calls, {"id": "raw", "json": '{"prompt":"hi","max_tokens":2}'})
        eventually(lambda: pusher.hget(keys.call("raw"), "state") == b"COMPLETED")
        found = pusher.hgetall(keys.call("raw"))
    result: dict[str, Any] = json.loads(found[b"result"])
    return result


def view(roles: Roles, monitor: Monitor, client: Client) -> None:
    """What observers and operators see."""
    running = client.submit("x", session="s4", max_tokens=100_000)
    eventually(lambda: monitor.running_calls())
    assert [c.request_id for c in monitor.active_calls()] == [running.id]
    assert monitor.stats()["completed"] >= 3
    assert {s["session_id"] for s in monitor.sessions()} >= {"s1", "s2", "s4"}
    assert monitor.call(running.id).state is RequestState.RUNNING
    assert DeadLetters(monitor.settings).ls() == []
    coordinator = KVCacheCoordinator(settings=roles.settings("router"))
    coordinator.record_cache_usage("s4", "e1", 5000)
    assert coordinator.get_best_engine_for_session("s4", ["e1"], 5000) == "e1"
    for role in ("operator", "observer"):
        # Checks may find something, but none may lack the permission to look.
        said = {c.name: c.detail for c in examine(roles.settings(role))}
        blind = [name for name, detail in said.items() if "could not be checked" in detail or "refuses" in detail]
        assert blind == ([] if role == "operator" else ["scripts"]), said
    assert client.cancel(running.id)


def drain(roles: Roles, worker: WorkerProcess) -> None:
    """Replays a dead letter, then takes the engine out of service."""
    settings = roles.settings("operator")
    with roles.client("operator") as server:
        moved = order_drain(settings, server, "e1", "stop")
    assert moved == 0
    assert worker.wait() == 0, worker.log()


def test_a_dead_letter_can_be_replayed_by_an_operator(
    roles: Roles, settings: Settings, worker_process: WorkerProcess
) -> None:
    monitor = Monitor(roles.settings("observer"))
    eventually(lambda: state_of(monitor, "e1") == "READY")
    keys = Keys(settings.namespace)
    with roles.client("router") as router:  # the process that writes dead letters
        router.xadd(
            keys.dead,
            {"id": "d1", "error_code": "engine_error", "kind": "generate", "session": "d1", "json": '{"prompt":"a"}'},
        )
    letters = DeadLetters(roles.settings("operator"))
    assert letters.replay("d1") == "d1"
    eventually(lambda: monitor.call("d1").state is RequestState.COMPLETED)
    assert letters.count() == 0
    worker_dies(worker_process, monitor)
    assert roles.refusals() == []


def worker_dies(worker: WorkerProcess, monitor: Monitor) -> None:
    """A router moves the calls of a dead engine, with its own user."""
    worker.kill()
    eventually(lambda: state_of(monitor, "e1") == "DEAD")


def test_admission_works_with_each_process_under_its_own_user(
    roles: Roles, settings: Settings, db: redis.Redis
) -> None:
    world = World(db, settings.model_copy(update={"admission": True}))
    workers = [FakeWorker(settings, e, server=db, kv_tokens=100).up() for e in ("e1", "e2")]
    t = world.transitions
    with roles.client("producer") as producer, roles.client("router") as router, roles.client("worker") as worker:
        for n in range(8):
            execute.run(producer, t.submit([world.prepare(f"c{n}", session=f"s{n}")]))
        for n in range(8):
            execute.run(router, t.snapshot([f"s{n}"]))
            place = world.placement(f"c{n}", "e2" if n in (2, 3) else "e1", context=50, new=50)
            execute.run(router, t.assign([place]))
        for fake in workers:
            fake.db = worker
        workers[0].finish(workers[0].take(), resident_tokens=0)
        assert [f["id"] for _, f in world.stream()] == ["c4"]
        workers[1].release(workers[1].take())
        assert execute.run(producer, t.cancel("c5", "held")) == "cancelled"
        assert execute.run(producer, t.cancel("c1", "in the queue")) == "cancelled"
        assert execute.run(producer, t.session("end", "s0")) == 0
        assert execute.run(router, t.admit_throttled()) == 2
        with roles.client("operator") as operator:
            assert execute.run(operator, t.drain("e2")) == 1
            assert execute.run(operator, t.cancel("c6", "on the stream")) == "cancelled"
        execute.run(router, t.reap("e1", workers[0].incarnation))
        with roles.client("observer") as observer:
            assert Monitor(world.settings, observer).stats()["throttled"] == 0
    assert roles.refusals() == []


def test_a_node_serves_an_operator(roles: Roles, settings: Settings, tmp_path: Path) -> None:
    env = clean_env() | roles.settings("node").environment()
    with (tmp_path / "node.log").open("ab") as log:
        node = subprocess.Popen([RSM, "node", "--name", "host"], env=env, stdout=log, stderr=log)
    try:
        await_listening(roles.settings("operator"), "host")
        operator = NodeClient("host", roles.settings("operator"))
        assert operator.start_engine(sim("e2"), 40)["state"] == "READY"
        assert operator.stop_engine("e2")["state"] == "STOPPED"
    finally:
        node.terminate()
        node.wait(20)
        for process in processes_of(roles.settings("node")):
            process.kill()
    assert roles.refusals() == []


# -- what is refused

NS, OTHER = "{NS}:", "{other}:"
_EVERYBODY = [
    "CONFIG GET *", "CONFIG SET maxmemory 1", "FLUSHALL", "FLUSHDB", "KEYS *", "SHUTDOWN NOSAVE",
    "SCRIPT FLUSH", "SCRIPT KILL", "MODULE LIST", "ACL LIST", "ACL SETUSER x on", "CLIENT KILL TYPE normal", "MONITOR",
    "REPLICAOF NO ONE", "SAVE", "BGREWRITEAOF", "SLOWLOG GET", "FUNCTION LIST", "SWAPDB 0 1", "RANDOMKEY",
    "MIGRATE h 1 k 0 1",
    f"GET {OTHER}x", f"HGETALL {OTHER}call:c1", f"XADD {OTHER}calls * json {{}}", f"DEL {OTHER}calls",
    "SET elsewhere 1",
    f"HGETALL {NS[:-2]}2}}:call:c1", f"DUMP {NS}call:c1", f"RENAME {NS}call:c1 {NS}call:c2", f"COPY {NS}call:c1 x",
    f"EVAL return(redis.call('GET',KEYS[1])) 1 {OTHER}x", f"EVAL return(redis.call('FLUSHALL')) 1 {NS}",
]  # fmt: skip
_NO_RQ = ["HGETALL rq:job:x", "LPUSH rq:queue:x y", "SADD rq:queues x", "PUBLISH rq:pubsub:x y", "SUBSCRIBE x"]
_READ_ONLY = [
    f"HSET {NS}call:c1 state COMPLETED", f"DEL {NS}call:c1", f"XADD {NS}calls * json {{}}", f"PEXPIRE {NS}call:c1 1",
    f"XADD {NS}engine:e1:control * op stop", f"EVAL return(1) 1 {NS}", f"XDEL {NS}dead 1-1", "SCRIPT LOAD return(1)",
    f"SET {NS}order:j x",
]  # fmt: skip
FORBIDDEN = {
    "pusher": [
        *_NO_RQ, *_READ_ONLY[:2], *_READ_ONLY[3:], f"XRANGE {NS}calls - +", f"XDEL {NS}calls 1-1",
        f"XTRIM {NS}calls MAXLEN 0", f"HGETALL {NS}engine:e1",
        f"HGETALL {NS}stats", f"XRANGE {NS}dead - +", "SCAN 0", f"HGETALL {NS}session:s",
    ],
    "producer": [
        *_NO_RQ, f"XDEL {NS}calls 1-1", f"XTRIM {NS}calls MAXLEN 0", f"DEL {NS}calls",
        f"XGROUP DESTROY {NS}calls router",
        f"XREADGROUP GROUP router r STREAMS {NS}calls >", f"XRANGE {NS}dead - +", f"XDEL {NS}dead 1-1", "SCAN 0",
        f"HSET {NS}engine:e1 state DEAD", f"DEL {NS}engine:e1", f"ZADD {NS}engines 0 e1",
        f"ZADD {NS}engine:e1:queue 0 c",
        f"ZRANGE {NS}engine:e1:queue 0 -1", f"BLPOP {NS}engine:e1:bell 1", f"DEL {NS}engine:e1:queue", "INFO",
        f"SET {NS}order:j x",
    ],
    "router": [*_NO_RQ, "SCAN 0", f"XGROUP DESTROY {NS}calls router"],
    "worker": [
        *_NO_RQ, f"XRANGE {NS}calls - +", f"XDEL {NS}calls 1-1", f"XREADGROUP GROUP router r STREAMS {NS}calls >",
        f"XTRIM {NS}calls MAXLEN 0", f"ZADD {NS}routers 0 r", "SCAN 0", f"DEL {NS}dead",
    ],
    "node": [
        f"SET {NS}order:j x", f"DEL {NS}order:j", f"XTRIM {NS}calls MAXLEN 0", "PUBLISH other y", "SUBSCRIBE other",
    ],
    "observer": [*_NO_RQ, *_READ_ONLY, f"BLPOP {NS}engine:e1:bell 1"],
    "operator": [f"SET {NS}stats x", f"XDEL {NS}calls 1-1", f"XTRIM {NS}calls MAXLEN 0", "PUBLISH other y"],
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
def test_each_forbidden_thing_is_refused(role: str, roles: Roles, settings: Settings) -> None:
    with roles.client(role) as client:
        answers = {
            command: refusal(client, command.replace("{NS", f"{{{settings.namespace}").split(" "))
            for command in [*_EVERYBODY, *FORBIDDEN[role]]
        }
    assert [(command, said) for command, said in answers.items() if said != "NOPERM"] == []


def refusal(client: Any, words: list[str]) -> str:
    """Redis's reply to a command that the user may not run."""
    try:
        reply = client.execute_command(*words)
    except Denied:
        return "NOPERM"
    except redis.RedisError as e:
        return f"{type(e).__name__} {e}"
    return f"reply {reply!r}"


# -- what denied users see


def test_a_process_with_a_wrong_password_says_so_and_ends(roles: Roles, tmp_path: Path) -> None:
    for role in ("router", "worker"):
        status, said = end_of(role, roles.settings(role, "not-it"), tmp_path)
        assert status == os.EX_CONFIG
        assert "rejects this user name or password" in said
        assert "not-it" not in said


def test_a_process_under_the_wrong_role_says_so_and_ends(roles: Roles, tmp_path: Path) -> None:
    for role, other in (("router", "producer"), ("worker", "pusher")):
        status, said = end_of(role, roles.settings(other), tmp_path)
        assert status == os.EX_CONFIG
        assert "denies this user a command" in said
        assert "rsm acl" in said


def end_of(part: str, settings: Settings, folder: Path) -> tuple[int, str]:
    """The exit status of a process that ends itself, and its output."""
    if part == "worker":
        process = WorkerProcess(sim(), settings, folder / f"{part}.log")
        return process.wait(), process.log()
    env = clean_env() | settings.environment()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rsm.router"], env=env, capture_output=True, text=True, timeout=40, check=False
    )
    return done.returncode, done.stdout + done.stderr


async def test_a_client_with_a_wrong_password_fails_at_once(roles: Roles) -> None:
    with Client(settings=roles.settings("producer", "not-it")) as client, pytest.raises(AccessDenied) as refused:
        client.submit("hi")
    assert "not-it" not in str(refused.value)
    async with AsyncClient(settings=roles.settings("producer", "not-it")) as client2:
        with pytest.raises(AccessDenied, match="password"):
            await client2.submit("hi")
    with (
        Client(settings=roles.settings("observer")) as client,
        pytest.raises(AccessDenied, match="permissions of its role"),
    ):
        client.submit("hi")


def test_a_router_waits_while_its_password_is_changed(roles: Roles, settings: Settings, db: redis.Redis) -> None:
    router = Router(roles.settings("router"))
    thread = threading.Thread(target=router.run)
    thread.start()
    keys, server = Keys(settings.namespace), typing.cast("Any", db)
    user = user_name(keys, "router")
    eventually(lambda: server.zcard(keys.routers))
    server.execute_command("ACL SETUSER", user, "resetpass", ">another")
    server.execute_command("CLIENT KILL", "USER", user)
    server.delete(keys.routers)
    time.sleep(0.3)
    assert thread.is_alive()
    server.execute_command("ACL SETUSER", user, f">{secret('router')}")
    eventually(lambda: server.zcard(keys.routers))
    router.stop()
    thread.join()


# -- the file


def test_the_file_in_deploy_is_what_the_command_prints() -> None:
    shipped = (ROOT / "deploy" / "users.acl").read_text()
    assert shipped == acl_file("rsm", {}) == run("acl").stdout
    # All its users are locked.
    assert shipped.count(f"#{LOCKED} ") == len(shipped.splitlines()) == len(ROLES) + 1, (
        "all users of the shipped file are locked"
    )


def test_a_server_loads_the_file_and_accepts_its_users(tmp_path: Path) -> None:
    (tmp_path / "passwords").write_text("observer open sesame\ndefault root\n")
    text = run("acl", "--namespace", "n1", "--passwords", str(tmp_path / "passwords")).stdout
    assert "sesame" not in text
    with tempfile.TemporaryDirectory(prefix="rsm-acl-") as name:
        (Path(name) / "users.acl").write_text(text)
        socket = f"{name}/s"
        server = subprocess.Popen(
            [find_server(), "--port", "0", "--unixsocket", socket, "--dir", name, "--aclfile", f"{name}/users.acl"],
            stdout=subprocess.DEVNULL,
        )
        try:
            eventually(lambda: Path(socket).exists())
            entrances = {
                login: login_to(socket, *login)
                for login in (
                    (None, None), ("default", "root"), ("n1-observer", "open sesame"), ("n1-observer", "x"),
                    ("n1-worker", ""),
                )
            }  # fmt: skip
        finally:
            server.terminate()
            server.wait()
    assert list(entrances.values()) == [False, True, True, False, False]


def login_to(socket: str, user: str | None, password: str | None) -> bool:
    with redis.Redis(unix_socket_path=socket, username=user, password=password) as client:
        try:
            return bool(client.ping())
        except redis.AuthenticationError:
            return False


def test_a_worker_may_take_better_calls_and_wake_its_claimer(roles: Roles) -> None:
    with roles.client("worker") as server:
        worker = FakeWorker(roles.settings("worker"), server=server).up()
        assert worker.claim(0, ahead=2, threshold=(1, 0)) == []
        assert execute.run(server, worker.transitions.wake(worker.engine)) == 1
    assert roles.refusals() == []


def test_a_line_that_names_no_role_is_refused() -> None:
    done = run("acl", "--passwords", "-", text="nobody secret\n")
    assert done.returncode == 1
    assert "producer" in done.stderr
    assert "secret" not in done.stderr


def test_every_command_of_the_scripts_is_granted_to_a_role() -> None:
    """If a script gets a new command, broker/protocol/acl.py must grant it to its users, with the keys."""
    roles = ("producer", "router", "worker")
    granted = {c for name in roles for grant in ROLES[name].grants for c in grant.commands.split()}
    for entry in LUA.glob("*/*.lua"):
        used = {found.lower() for found in re.findall(r"(?:redis\.call|later)\('([A-Z]+)'", entry.read_text())}
        assert used - {"xgroup"} <= granted, f"{entry.name}: {used - granted}"
