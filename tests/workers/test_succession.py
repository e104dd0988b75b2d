"""Two workers, one engine id: a worker that lost the lease does not affect its successor, even when it dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import redis

from rsm.broker import Client, Settings
from rsm.broker.connection import execute
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.views.monitor import Monitor
from rsm.workers.environment import EXIT_ID_TAKEN
from rsm.workers.supervision.launch import is_of, report_death, worker_process
from tests.support.fake_worker import routing
from tests.support.sim_processes import Start, sim, state_of
from tests.support.waiting import eventually


@pytest.mark.parametrize("end", ["wakes", "dies"])
def test_a_worker_that_lost_its_lease_while_it_loaded(
    settings: Settings, client: Client, monitor: Monitor, start: Start, tmp_path: Path, end: str
) -> None:
    with (tmp_path / "late.log").open("ab") as log, routing(settings):
        late = worker_process(sim("e1", load_s=2.0), settings, output=log.fileno())
        late.start()
        eventually(lambda: state_of(monitor, "e1") == "STARTING")
        pid = late.pid or 0
        os.kill(pid, signal.SIGSTOP)
        try:
            successor = start("e1")
            handle = client.submit("x", max_tokens=300, stream=True)
            eventually(lambda: handle.record().state == "RUNNING")
        finally:
            os.kill(pid, signal.SIGKILL if end == "dies" else signal.SIGCONT)
        if end == "wakes":
            assert late.wait() == EXIT_ID_TAKEN, "it is refused, and not restarted"
        else:
            eventually(lambda: late.restarts > 0, what="its supervisor restarted it")
        engine = monitor.engine("e1")
        assert (engine["pid"], engine["state"]) == (successor.pid, "READY")
        assert handle.result(30).attempts == 1, "the successor kept its call"
        late.stop()


def test_a_death_is_reported_by_birth(settings: Settings, monitor: Monitor, start: Start) -> None:
    """By then another process may have the dead one's pid, and a successor its engine id."""
    worker = start("e1")
    incarnation = monitor.engine("e1")["incarnation"]
    report_death(settings, "e1", "another-birth")
    assert monitor.engine("e1")["state"] == "READY"
    worker.kill()
    report_death(settings, "e1", incarnation)
    assert monitor.engine("e1")["state"] == "DEAD"
    report_death(settings, "no-such-engine", incarnation)


def test_the_births_of_one_process() -> None:
    assert is_of("a", "a")
    assert is_of("a.2", "a")
    assert not is_of("a2", "a")
    assert not is_of("b.a", "a")
    assert not is_of("", "a")


def test_the_registration_facts_of_an_engine_are_fenced(
    monitor: Monitor, transitions: Transitions, db: redis.Redis, start: Start
) -> None:
    worker = start("e1")
    before = monitor.engine("e1")
    command = transitions.heartbeat(
        "e1", "an-old-incarnation", "READY", {"pid": 1, "model": "wrong", "max_num_seqs": 9}
    )
    assert execute.run(db, command) is False
    after = monitor.engine("e1")
    assert (after["pid"], after["model"], after["max_num_seqs"]) == (worker.pid, before["model"], 64)
    assert after["incarnation"] == before["incarnation"]
