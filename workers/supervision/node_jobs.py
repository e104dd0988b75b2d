"""What a node does by order: the jobs that RQ runs there, each in a process of its own that ends with the job.

The engines it starts are no children of that process: each is a detached supervisor with its worker. Until its start
has succeeded, a supervisor is tentative: it ends with the job, also when that is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from rsm.broker import child_process
from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import persist
from rsm.broker.errors import EngineFailed, UnknownCall
from rsm.broker.protocol.ids import check_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.models import EngineState
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.monitor import Monitor
from rsm.workers.config import EngineConfig
from rsm.workers.environment import CONFIG_VARIABLE, NODE_VARIABLE, SUPERVISED_FLAG, TENTATIVE_FLAG
from rsm.workers.supervision.launch import report_death
from rsm.workers.supervision.orders import POLL_S, OrderLease

log = logging.getLogger("rsm.node")

# What a worker may take to leave, beyond the grace.
LEAVE_S = 30
_GONE = (EngineState.STOPPED, EngineState.DEAD, "")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job runs, and for whom."""

    node: str
    settings: Settings
    server: redis.Redis
    lease: OrderLease


def start_engine(here: Place, config: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Starts a detached, supervised worker on this host; returns its status once it is READY.

    Whatever else ends this job, such as a giver who is gone, undoes the start: the worker is stopped again.
    """
    engine = EngineConfig(**config)
    if _state(here, engine.engine_id) in (EngineState.STARTING, EngineState.READY, EngineState.DRAINING):
        raise EngineFailed(f"Engine id {engine.engine_id} is in use; stop that engine, or choose another id.")
    supervisor = _start_supervisor(here, engine)
    try:
        _await_ready(here, engine.engine_id, supervisor, timeout_s)
        _let_stay(supervisor)
    except BaseException:
        _undo(here, engine.engine_id, supervisor)
        raise
    log.info("engine %s started", engine.engine_id)
    return _status(here, engine.engine_id)


def stop_engine(here: Place, engine_id: str, drain: bool) -> dict[str, Any]:
    """Stops an engine of this host; one that does not leave within the grace is killed."""
    _require_here(here, engine_id)
    status = drain_engine(here, engine_id, "stop")
    supervisor, worker = int(status["supervisor"]), int(status["pid"])
    until = time.monotonic() + (here.settings.drain_grace_s + LEAVE_S if drain else 0)
    while _alive(supervisor) or _alive(worker) or _state(here, engine_id) not in _GONE:
        if time.monotonic() > until:
            _kill_session(supervisor)  # first, for it would start the worker again
            _bury(here, status)
        time.sleep(POLL_S)
    log.info("engine %s stopped", engine_id)
    return _status(here, engine_id)


def drain_engine(here: Place, engine_id: str, op: str = "drain") -> dict[str, Any]:
    """Takes an engine out of service; its waiting calls go to others."""
    check_id(engine_id, "engine")
    server, transitions = connect(here.settings), Transitions(Keys(here.settings.namespace), here.settings)
    while True:
        moved = execute.run(server, transitions.drain(engine_id, op))
        if moved < 0:
            raise EngineFailed(f"There is no live engine {engine_id} to {op}.")
        if moved < here.settings.batch:
            return _status(here, engine_id)


def replay_letters(here: Place, ref: str) -> dict[str, Any]:
    """Sends the call of one dead letter again, or with "" all of them."""
    letters = DeadLetters(here.settings)
    if not ref:
        return letters.replay_all()._asdict()
    return {"id": letters.replay(ref)}


JOBS = {
    f"{job.__module__}.{job.__qualname__}": job for job in (start_engine, stop_engine, drain_engine, replay_letters)
}


# -- a start


def _start_supervisor(here: Place, engine: EngineConfig) -> subprocess.Popen[bytes]:
    env = os.environ | here.settings.environment()
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "rsm.workers", SUPERVISED_FLAG, TENTATIVE_FLAG],
        env=env | {CONFIG_VARIABLE: engine.as_json(), NODE_VARIABLE: here.node},
        stdin=subprocess.PIPE,
        start_new_session=True,  # RQ ends a job by killing its process group
    )


def _await_ready(here: Place, engine_id: str, supervisor: subprocess.Popen[bytes], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not _is_ready(here, engine_id, supervisor.pid):
        here.lease.look()
        if supervisor.poll() is not None:
            why = _cause(here, engine_id) or f"its supervisor ended with status {supervisor.returncode}."
            raise EngineFailed(f"Engine {engine_id} did not start: {why}")
        if time.monotonic() > until:
            raise EngineFailed(
                f"Engine {engine_id} was not ready after {timeout_s:g} s. {_cause(here, engine_id)}".rstrip()
            )
        time.sleep(POLL_S)


def _is_ready(here: Place, engine_id: str, supervisor: int) -> bool:
    """Whether it is READY, and no other that has taken its id meanwhile."""
    status = _status(here, engine_id)
    return _is_ours(here, status, supervisor) and status["state"] == EngineState.READY


def _is_ours(here: Place, status: dict[str, Any], supervisor: int) -> bool:
    return bool(status) and (status["node"], status["supervisor"]) == (here.node, supervisor)


def _let_stay(supervisor: subprocess.Popen[bytes]) -> None:
    """From here on it lives without this job."""
    assert supervisor.stdin is not None  # noqa: S101
    os.write(supervisor.stdin.fileno(), b"\n")
    supervisor.stdin.close()


def _cause(here: Place, engine_id: str) -> str:
    """What the last worker under this id said of its end, if it said anything."""
    return str(_status(here, engine_id).get("error") or "")


def _undo(here: Place, engine_id: str, supervisor: subprocess.Popen[bytes]) -> None:
    """Returns once supervisor and worker are gone and the id is free, for the next order may use it again."""
    child_process.stop(supervisor, here.settings.drain_grace_s + LEAVE_S)
    status = _status(here, engine_id)
    if _is_ours(here, status, supervisor.pid) and status["state"] not in _GONE:
        _bury(here, status)
    log.info("the start of engine %s was undone", engine_id)


# -- what is known of an engine, and of its processes


def _status(here: Place, engine_id: str) -> dict[str, Any]:
    """Nothing, if there is no such engine. A Redis that is away is waited for."""
    monitor = Monitor(here.settings, here.server)
    try:
        return persist(lambda: monitor.engine(engine_id), "node", lambda: False) or {}
    except UnknownCall:
        return {}


def _state(here: Place, engine_id: str) -> str:
    return str(_status(here, engine_id).get("state", ""))


def _require_here(here: Place, engine_id: str) -> None:
    """Its pids mean something on its own host alone: elsewhere they are those of strangers."""
    node = _status(here, engine_id).get("node", here.node)  # of one that is not known, the order to drain says so
    if node != here.node:
        raise EngineFailed(f"Engine {engine_id} runs on node {node}; ask that one to stop it.")


def _bury(here: Place, status: dict[str, Any]) -> None:
    """kill -9 for the worker, if it is there, and its calls to others."""
    _kill_session(status["pid"])
    report_death(here.settings, status["engine_id"], str(status["incarnation"]))


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not _ended(pid)


def _ended(pid: int) -> bool:
    """Whether only its exit status is left: in a container whose first process is no init, nobody takes that."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "Z"


def _kill_session(pid: int) -> None:
    if _alive(pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
