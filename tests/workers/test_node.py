"""`rsm node`: RQ jobs start, drain and stop engines on a host. The engines outlive the node's own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr
from rq import Callback, Queue
from rq.results import Result
from rq.serializers import JSONSerializer

from rsm.broker import Client, EngineFailed, InvalidRequest, Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.monitor import Monitor
from rsm.engine import EngineConfig, MultiEngineManager
from rsm.workers.supervision.node import NodeClient, listening, queue_name
from rsm.workers.supervision.node_jobs import _alive
from tests.support.fake_worker import FakeWorker, patient, routing
from tests.support.nodes.orders import jobs_of
from tests.support.nodes.process import NAME, START_S, Node, await_listening, workers_of
from tests.support.sim_processes import processes_of, said, sim, state_of
from tests.support.waiting import eventually


def test_an_engine_on_a_node_outlives_the_node(
    settings: Settings, node: Node, manager: MultiEngineManager, client: Client, monitor: Monitor
) -> None:
    manager.add_engine(sim("n1"), node=NAME)
    status = manager.get_engine_status("n1")
    assert (status["state"], status["node"]) == ("READY", NAME)
    assert client.submit("x", max_tokens=4).result(20).text == said("x", 4)

    running = client.submit("y", stream=True, max_tokens=300)
    eventually(lambda: client.redis.xlen(client.keys.events(running.id)))
    assert node.restart(signal.SIGKILL) == -signal.SIGKILL
    assert node.restart(signal.SIGTERM) == 0
    result = running.result(20)
    assert (result.text, result.attempts) == (said("y", 300), 1)
    assert monitor.engine("n1")["pid"] == status["pid"]

    manager.remove_engine("n1")
    assert state_of(monitor, "n1") == "STOPPED"
    assert not psutil.pid_exists(status["pid"])
    assert workers_of(settings) == []


def test_stop_without_drain_moves_calls_to_other_engines(
    settings: Settings, node: Node, client: Client, monitor: Monitor
) -> None:
    """The call would take minutes on the first engine, so it still runs there when the second one is ready."""
    host = NodeClient(NAME, settings)
    with routing(settings):
        host.start_engine(sim("n1", step_s=1.0), START_S)
        handle = client.submit("x", stream=True, max_tokens=500)
        eventually(lambda: client.redis.xlen(client.keys.events(handle.id)))
        host.start_engine(sim("n2", step_s=0.001), START_S)
        host.stop_engine("n1", drain=False)
        assert state_of(monitor, "n1") == "DEAD"
        result = handle.result(30)
        assert (result.engine_id, result.text, result.attempts) == ("n2", said("x", 500), 2)
        host.stop_engine("n2")


def test_stop_waits_for_running_calls(settings: Settings, node: Node, client: Client) -> None:
    """It waits longer than redis-py's default timeout, 5 s."""
    host = NodeClient(NAME, settings)
    with routing(settings):
        host.start_engine(sim("n1"), START_S)
        handle = client.submit("x", stream=True, max_tokens=650)
        eventually(lambda: client.redis.xlen(client.keys.events(handle.id)))
        assert host.stop_engine("n1")["state"] == "STOPPED"
        assert handle.result(5).attempts == 1


def test_a_node_outlives_its_redis(settings: Settings, tmp_path: Path) -> None:
    with EmbeddedRedis() as server:
        there = settings.with_redis(server.url)
        node = Node(there, tmp_path / "node.log")
        try:
            await_listening(there, NAME)
            server.kill()
            server.start()
            await_listening(there, NAME)
            host = NodeClient(NAME, there)
            assert host.start_engine(sim("n1"), START_S)["state"] == "READY"
            host.stop_engine("n1")
            assert node.process.poll() is None
        finally:
            node.end()
            assert not processes_of(there)


def test_drain_and_orders_that_fail(settings: Settings, node: Node, db: Any, monitor: Monitor) -> None:
    host = NodeClient(NAME, settings)
    assert host.start_engine(sim("n1"), START_S)["state"] == "READY"
    with pytest.raises(EngineFailed, match=r"^Engine id n1 is in use; stop that engine, or choose another id\.$"):
        host.start_engine(sim("n1"), START_S)
    with pytest.raises(EngineFailed, match=r"^Engine n2 did not start: .*nonsense"):
        host.start_engine(sim("n2", nonsense=1), START_S)
    with pytest.raises(EngineFailed, match=r"^There is no live engine n3 to drain\.$"):
        host.drain_engine("n3")
    with pytest.raises(InvalidRequest, match="RSM_OPENAI_API_KEY"):
        host.start_engine(
            EngineConfig(engine_id="n4", backend="openai", base_url="http://x", api_key=SecretStr("geheim")), START_S
        )
    FakeWorker(settings, "far", server=db, node="elsewhere").up()
    with pytest.raises(
        EngineFailed, match=r"^Engine far runs on node elsewhere; stop it with `rsm stop far --node elsewhere`\.$"
    ):
        host.stop_engine("far")

    assert host.drain_engine("n1")["state"] == "DRAINING"
    worker = monitor.engine("n1")["pid"]
    eventually(lambda: "drains" in node.log())
    assert psutil.pid_exists(worker)
    host.stop_engine("n1")
    assert not psutil.pid_exists(worker)
    with pytest.raises(EngineFailed, match="no live engine n1"):
        host.stop_engine("n1")


def test_jobs_are_json_with_a_time_limit_and_hold_no_secret(settings: Settings, node: Node, db: Any) -> None:
    host = NodeClient(NAME, settings)
    host.start_engine(sim("n1"), START_S)
    host.stop_engine("n1")
    found = jobs_of(settings, db)
    assert len(found) == 2
    for job in found.values():
        function, _, args, kwargs = json.loads(zlib.decompress(job[b"data"]))
        assert function.rpartition(".")[0] == "rsm.workers.supervision.node_jobs"
        assert function.rpartition(".")[2] in ("start_engine", "stop_engine")
        assert args[0] == "n1" or "api_key" not in args[0]
        assert kwargs == {}
        assert int(job[b"timeout"]) > 0
        assert int(job[b"result_ttl"]) > 0
        assert int(job[b"ttl"]) > 0


def test_a_node_replays_dead_letters(settings: Settings, node: Node, client: Client, db: Any) -> None:
    worker = FakeWorker(patient(settings).model_copy(update={"max_attempts": 1}), "e1").up()
    with routing(patient(settings)):
        for name in ("a", "b"):
            client.submit(f"prompt {name}", id=name)
            worker.release(worker.take_soon(), fault=True)
        assert listening(settings) == [NAME]
        letters = DeadLetters(settings, db)
        again = NodeClient(NAME, settings).replay("a", 30)
        assert again == {"id": worker.take_soon().fence.call_id}
        assert [letter.request_id for letter in letters.ls()] == ["b"]
        with pytest.raises(EngineFailed, match="There is no dead letter a"):
            NodeClient(NAME, settings).replay("a", 30)
        assert NodeClient(NAME, settings).replay("", 30) == {"sent": 1, "failures": [], "bodiless": 0}
        worker.take_soon()
        assert letters.count() == 0
        for call in list(worker.held.values()):
            worker.finish(call)
    worker.close()
    assert "prompt" not in node.log()


def test_a_process_that_has_ended_is_not_alive() -> None:
    """Not even while it is a zombie."""
    with subprocess.Popen(["true"]) as process:
        eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        os.kill(process.pid, 0)
        assert not _alive(process.pid)
    assert not _alive(process.pid)
    assert not _alive(0)
    assert _alive(os.getpid())


def test_a_node_runs_only_its_own_jobs(settings: Settings, node: Node, tmp_path: Path) -> None:
    """RQ runs any function that a job names, so anyone who can write its keys would own the host."""
    proof = tmp_path / "owned"
    with connect(settings) as plain:
        queue = Queue(queue_name(settings, NAME), connection=plain, serializer=JSONSerializer)
        job = queue.enqueue("os.mkdir", str(proof), on_failure=Callback("os.getcwd"))
        eventually(lambda: job.latest_result() is not None)
        result = job.latest_result()
    assert result.type == Result.Type.FAILED
    assert "A node only starts, stops and drains engines" in (result.exc_string or "")
    assert not proof.exists()
