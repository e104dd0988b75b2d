"""Orders to a node end with their client: an abandoned order is not begun, and a start in progress is undone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rsm.broker import EngineFailed, Settings
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.views.monitor import Monitor
from rsm.engine import MultiEngineManager
from rsm.workers.supervision.node import PRESENCE_S, NodeClient, listening, queue_name
from rsm.workers.supervision.orders import OrderLease
from tests.support.nodes.orders import jobs_of, queued
from tests.support.nodes.process import NAME, START_S, Node, await_listening, workers_of
from tests.support.rsm_command import RSM, clean_env
from tests.support.sim_processes import sim, state_of
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(240)

# Longer than any of these tests.
_LOAD_S = 600
# Twice what takes longest on an idle machine: a killed client's lease, and a worker that exits while it loads.
_BUSY_S = 60.0

# Sends its order as soon as its stdin ends, while `rsm start` would take a second.
_CLIENT = """
import sys
from rsm.broker import Settings
from rsm.workers.config import EngineConfig
from rsm.workers.supervision.node import NodeClient

print("here", flush=True)
sys.stdin.read()
NodeClient("host", Settings()).start_engine(EngineConfig(engine_id="n1", backend="sim"), 900)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(settings: Settings) -> Iterator[Start]:
    """Runs `rsm start --node host` for an engine that loads for `load_s` seconds."""
    started: list[subprocess.Popen[str]] = []

    def start(engine_id: str, load_s: float = _LOAD_S) -> subprocess.Popen[str]:
        words = ["start", "--node", NAME, "--engine-id", engine_id, "--backend", "sim", "--engine-arg"]
        started.append(
            subprocess.Popen(
                [RSM, *words, f"load_s={load_s}"],
                env=clean_env() | settings.environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def busy(start: Start, node: Node, monitor: Monitor) -> subprocess.Popen[str]:
    """The client of the order that keeps the node busy: the start of n1."""
    client = start("n1")
    await_loading(monitor, "n1")
    return client


def order_of(settings: Settings, db: Any, engine_id: str) -> str:
    """The order that waits for the node after that of n1."""
    eventually(lambda: len(queued(settings, db)) == 1, _BUSY_S, f"the order to start {engine_id} is queued")
    (order,) = queued(settings, db)
    return order


def assert_undone(settings: Settings, monitor: Monitor, engine_id: str) -> None:
    eventually(lambda: state_of(monitor, engine_id) in ("STOPPED", "DEAD"), _BUSY_S, f"{engine_id} is undone")
    eventually(lambda: workers_of(settings) == [])


def await_loading(monitor: Monitor, engine_id: str) -> None:
    eventually(lambda: state_of(monitor, engine_id) == "STARTING", _BUSY_S, f"{engine_id} loads")


# -- nodes that listen


def test_an_order_to_a_node_that_is_not_listening_fails_at_once(settings: Settings, node: Node, db: Any) -> None:
    nobody = NodeClient("nobody", settings)
    message = r"^Node nobody is not listening \(listening: host\); start `rsm node --name nobody` on that host\.$"
    orders: list[Callable[[], object]] = [
        lambda: nobody.start_engine(sim("n1"), START_S),
        lambda: nobody.stop_engine("n1"),
        lambda: nobody.drain_engine("n1"),
        lambda: nobody.replay("", START_S),
    ]
    for order in orders:
        with pytest.raises(EngineFailed, match=message):
            order()
    assert jobs_of(settings, db, "nobody") == {}
    assert queued(settings, db, "nobody") == []
    node.process.terminate()
    node.process.wait(30)
    with pytest.raises(EngineFailed, match=r"^Node host is not listening \(listening: none\)"):
        NodeClient(NAME, settings).stop_engine("n1")


def test_a_killed_node_is_noticed_within_the_stated_time(
    settings: Settings, db: Any, node: Node, manager: MultiEngineManager
) -> None:
    manager.add_engine(sim("n1"), node=NAME)
    node.process.kill()
    node.process.wait()
    ours = queue_name(settings, NAME).encode()
    (registered,) = [key for key in db.scan_iter("rq:worker:*", _type="hash") if db.hget(key, "queues") == ours]
    assert 0 < db.pttl(registered) <= PRESENCE_S * 1000
    eventually(lambda: listening(settings) == [])
    with pytest.raises(EngineFailed, match="is not listening"):
        manager.remove_engine("n1")
    node.start()
    await_listening(settings, NAME)
    manager.remove_engine("n1")  # it was not forgotten
    assert workers_of(settings) == []


def test_a_node_that_was_stopped_for_a_while_listens_again(settings: Settings, node: Node) -> None:
    node.process.send_signal(signal.SIGSTOP)
    eventually(lambda: listening(settings) == [])
    node.process.send_signal(signal.SIGCONT)
    await_listening(settings, NAME)


def test_a_long_start_outlives_the_lease_and_its_node_listens(
    settings: Settings, node: Node, start: Start, monitor: Monitor
) -> None:
    """The client renews its lease of 15 s, and a node that works for longer than 10 s does not count as dead."""
    client = start("n1", load_s=20)
    await_loading(monitor, "n1")
    seen = []
    while client.poll() is None:
        seen.append(listening(settings))
        time.sleep(0.2)
    assert client.returncode == 0, client.communicate()
    assert all(names == [NAME] for names in seen)
    assert state_of(monitor, "n1") == "READY"
    NodeClient(NAME, settings).stop_engine("n1")


# -- orders that wait


def test_an_order_that_waits_has_a_time_limit(
    settings: Settings, db: Any, busy: subprocess.Popen[str], start: Start
) -> None:
    start("n2")
    order = order_of(settings, db, "n2")
    job = jobs_of(settings, db)[order]
    assert 0 < db.ttl(f"rq:job:{order}") <= int(job[b"ttl"]) == int(job[b"timeout"]) == 960


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_order_is_taken_from_the_queue(
    number: int, settings: Settings, db: Any, busy: subprocess.Popen[str], start: Start
) -> None:
    client = start("n2")
    order = order_of(settings, db, "n2")
    client.send_signal(number)
    output, _ = client.communicate(timeout=30)
    assert client.returncode == 128 + number
    assert "The order to node host is withdrawn." in output
    assert queued(settings, db) == []
    assert order not in jobs_of(settings, db)
    assert busy.poll() is None


def test_an_order_that_is_not_begun_in_time_is_withdrawn(
    settings: Settings, db: Any, busy: subprocess.Popen[str]
) -> None:
    with pytest.raises(EngineFailed, match=r"^Node host did not answer within 1 s; the order is withdrawn\.$"):
        NodeClient(NAME, settings).replay("", 1)
    assert queued(settings, db) == []
    assert len(jobs_of(settings, db)) == 1


def test_a_start_whose_client_was_killed_while_it_waited_never_begins(
    settings: Settings, db: Any, monitor: Monitor, busy: subprocess.Popen[str], start: Start
) -> None:
    client = start("n2")
    order = order_of(settings, db, "n2")
    client.kill()
    eventually(lambda: not db.exists(Keys(settings.namespace).order(order)), _BUSY_S)
    busy.send_signal(signal.SIGINT)
    eventually(lambda: jobs_of(settings, db)[order][b"status"] == b"failed", _BUSY_S)
    assert_undone(settings, monitor, "n1")
    assert state_of(monitor, "n2") == ""


def test_a_start_whose_client_was_killed_while_the_node_was_stopped_never_begins(
    settings: Settings, db: Any, monitor: Monitor, node: Node
) -> None:
    """In a field case such an engine started 48 minutes later."""
    client = subprocess.Popen(
        [sys.executable, "-c", _CLIENT],
        env=clean_env() | settings.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdout.readline()
    node.process.send_signal(signal.SIGSTOP)
    client.stdin.close()
    client.stdin = None
    eventually(lambda: jobs_of(settings, db))
    client.kill()
    client.communicate()
    (order,) = jobs_of(settings, db)
    eventually(lambda: not db.exists(Keys(settings.namespace).order(order)), _BUSY_S)
    node.process.send_signal(signal.SIGCONT)
    eventually(lambda: jobs_of(settings, db)[order][b"status"] == b"failed")
    assert workers_of(settings) == []
    assert state_of(monitor, "n1") == ""


def test_all_orders_are_withdrawn_when_their_node_is_gone(
    settings: Settings, db: Any, node: Node, monitor: Monitor, busy: subprocess.Popen[str], start: Start
) -> None:
    """If a host loses power, a client does not wait for the time limit of a start, a quarter of an hour."""
    waiting = start("n2")
    order_of(settings, db, "n2")
    node.process.kill()
    node.process.wait()
    for client in (busy, waiting):
        output, _ = client.communicate(timeout=_BUSY_S)
        assert "Node host stopped listening before it answered; the order is withdrawn." in output
        assert client.returncode == 1
    assert queued(settings, db) == []
    assert_undone(settings, monitor, "n1")


# -- starts in progress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_abandoned_start_is_undone_and_its_id_is_free(
    number: int, settings: Settings, db: Any, monitor: Monitor, busy: subprocess.Popen[str]
) -> None:
    busy.send_signal(number)
    busy.wait(30)
    assert_undone(settings, monitor, "n1")
    assert queued(settings, db) == []
    host = NodeClient(NAME, settings)
    assert host.start_engine(sim("n1"), START_S)["state"] == "READY"
    host.stop_engine("n1")


def test_a_start_that_takes_too_long_is_undone(settings: Settings, node: Node, monitor: Monitor) -> None:
    with pytest.raises(EngineFailed, match=r"^Engine n1 was not ready after 1 s\.$"):
        NodeClient(NAME, settings).start_engine(sim("n1", load_s=_LOAD_S), 1)
    assert workers_of(settings) == []
    assert state_of(monitor, "n1") in ("", "STOPPED", "DEAD")


def test_a_start_whose_job_is_killed_is_undone(
    settings: Settings, node: Node, monitor: Monitor, busy: subprocess.Popen[str]
) -> None:
    """The kernel kills a job when memory runs out; RQ kills it to stop the job or the node at once."""
    node.job_process().kill()
    output, _ = busy.communicate(timeout=30)
    assert "The job failed on node host." in output
    eventually(lambda: workers_of(settings) == [], _BUSY_S)
    assert NodeClient(NAME, settings).start_engine(sim("n2"), START_S)["state"] == "READY"
    NodeClient(NAME, settings).stop_engine("n2")


def test_a_start_is_undone_by_a_node_that_is_stopped_at_once(
    settings: Settings, node: Node, busy: subprocess.Popen[str]
) -> None:
    def ended_by_another_sigterm() -> bool:
        node.process.terminate()
        return node.process.poll() is not None

    eventually(ended_by_another_sigterm)
    eventually(lambda: workers_of(settings) == [], _BUSY_S)
    output, _ = busy.communicate(timeout=_BUSY_S)
    assert (busy.returncode, "Node host stopped listening" in output) == (1, True)


def test_a_start_outlives_a_node_that_is_killed_and_restarted(
    settings: Settings, db: Any, node: Node, monitor: Monitor, start: Start
) -> None:
    client = start("n1", load_s=20)
    await_loading(monitor, "n1")
    node.restart(signal.SIGKILL)
    assert client.wait(60) == 0, client.communicate()
    assert state_of(monitor, "n1") == "READY"
    NodeClient(NAME, settings).stop_engine("n1")


def test_a_node_that_is_stopped_finishes_a_start_first(
    settings: Settings, node: Node, monitor: Monitor, start: Start
) -> None:
    client = start("n1", load_s=3)
    await_loading(monitor, "n1")
    node.process.terminate()
    assert client.wait(60) == 0, client.communicate()
    assert node.process.wait(30) == 0
    assert state_of(monitor, "n1") == "READY"


def test_a_stop_in_progress_is_completed_without_its_client(
    settings: Settings, db: Any, node: Node, monitor: Monitor
) -> None:
    NodeClient(NAME, settings).start_engine(sim("n1"), START_S)
    worker = monitor.engine("n1")["pid"]
    os.kill(worker, signal.SIGSTOP)  # so that the stop waits
    client = subprocess.Popen([RSM, "stop", "n1", "--node", NAME], env=clean_env() | settings.environment())
    eventually(lambda: any(job[b"status"] == b"started" for job in jobs_of(settings, db).values()))
    client.send_signal(signal.SIGINT)
    assert client.wait(30) == 128 + signal.SIGINT
    os.kill(worker, signal.SIGCONT)
    eventually(lambda: workers_of(settings) == [])
    eventually(lambda: all(job[b"status"] == b"finished" for job in jobs_of(settings, db).values()))


# -- the lease itself


def test_a_lease_may_be_missing_for_a_moment(settings: Settings, db: Any) -> None:
    """Redis has lost the lease, and the client renews it a moment later."""
    lease = OrderLease(db, settings, new_id())
    for _ in range(100):
        assert not lease.check()
        lease.renew()
        assert lease.check()
        lease.end()
    with pytest.raises(EngineFailed, match="The client withdrew this order or is gone"):
        check_until_found(lease)


def check_until_found(lease: OrderLease) -> None:
    while not lease.check():
        pass


def test_a_client_can_send_several_orders_at_once(settings: Settings, node: Node) -> None:
    """A node runs one after the other, and each caller waits for its own."""
    host = NodeClient(NAME, settings)
    with ThreadPoolExecutor(2) as pool:
        states = [s["state"] for s in pool.map(lambda e: host.start_engine(sim(e), START_S), ["n1", "n2"])]
    assert states == ["READY", "READY"]
    for engine_id in ("n1", "n2"):
        host.stop_engine(engine_id)
