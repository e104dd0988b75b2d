"""The jobs that RQ runs on a node, each in a process of its own that ends with the job.

The engines that a job starts are not children of that process: each is a detached supervisor with its worker. Until the
start has succeeded, a supervisor is tentative: it ends with the job, even if the job is killed.
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

# How long a worker may take to exit, beyond the grace period.
LEAVE_S = 30
_GONE = (EngineState.STOPPED, EngineState.DEAD, "")


@dataclass(frozen=True, slots=True)
class Place:
    """The context of a job: the node, and the lease of the client's order."""

    node: str
    settings: Settings
    server: redis.Redis
    lease: OrderLease


def start_engine(here: Place, config: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Starts a detached, supervised worker on this host; returns its status once it is READY.

    If the job ends in any other way, for example because the client is gone, the worker is stopped again.
    """
    engine = EngineConfig(**config)
    if _state(here, engine.engine_id) in (EngineState.STARTING, EngineState.READY, EngineState.DRAINING):
        raise EngineFailed(f"Engine id {engine.engine_id} is in use; stop that engine, or choose another id.")
    supervisor = _start_supervisor(here, engine)
    try:
        _await_ready(here, engine.engine_id, supervisor, timeout_s)
        _confirm(supervisor)
    except BaseException:
        _undo(here, engine.engine_id, supervisor)
        raise
    log.info("engine %s started", engine.engine_id)
    return _status(here, engine.engine_id)


def stop_engine(here: Place, engine_id: str, drain: bool) -> dict[str, Any]:
    """Stops an engine of this host; kills it if it does not exit within the grace period."""
    _require_here(here, engine_id)
    status = drain_engine(here, engine_id, "stop")
    supervisor, worker = int(status["supervisor"]), int(status["pid"])
    until = time.monotonic() + (here.settings.drain_grace_s + LEAVE_S if drain else 0)
    while _alive(supervisor) or _alive(worker) or _state(here, engine_id) not in _GONE:
        if time.monotonic() > until:
            _kill_session(supervisor)  # first, or it would restart the worker
            _kill_worker(here, status)
        time.sleep(POLL_S)
    log.info("engine %s stopped", engine_id)
    return _status(here, engine_id)


def drain_engine(here: Place, engine_id: str, op: str = "drain") -> dict[str, Any]:
    """Drains an engine; its waiting calls go to other engines."""
    check_id(engine_id, "engine")
    server, transitions = connect(here.settings), Transitions(Keys(here.settings.namespace), here.settings)
    while True:
        moved = execute.run(server, transitions.drain(engine_id, op))
        if moved < 0:
            raise EngineFailed(f"There is no live engine {engine_id} to {op}.")
        if moved < here.settings.batch:
            return _status(here, engine_id)


def replay_letters(here: Place, ref: str) -> dict[str, Any]:
    """Replays the call of one dead letter, or with "" of all of them."""
    letters = DeadLetters(here.settings)
    if not ref:
        return letters.replay_all()._asdict()
    return {"id": letters.replay(ref)}


JOBS = {
    f"{job.__module__}.{job.__qualname__}": job for job in (start_engine, stop_engine, drain_engine, replay_letters)
}


# -- starting an engine


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
        here.lease.check()
        if supervisor.poll() is not None:
            why = _cause(here, engine_id) or f"its supervisor ended with status {supervisor.returncode}."
            raise EngineFailed(f"Engine {engine_id} did not start: {why}")
        if time.monotonic() > until:
            raise EngineFailed(
                f"Engine {engine_id} was not ready after {timeout_s:g} s. {_cause(here, engine_id)}".rstrip()
            )
        time.sleep(POLL_S)


def _is_ready(here: Place, engine_id: str, supervisor: int) -> bool:
    """Whether the engine is READY and not another one that has taken its id in the meantime."""
    status = _status(here, engine_id)
    return _is_ours(here, status, supervisor) and status["state"] == EngineState.READY


def _is_ours(here: Place, status: dict[str, Any], supervisor: int) -> bool:
    return bool(status) and (status["node"], status["supervisor"]) == (here.node, supervisor)


def _confirm(supervisor: subprocess.Popen[bytes]) -> None:
    """Confirms a tentative supervisor: from now on it outlives this job."""
    assert supervisor.stdin is not None  # noqa: S101
    os.write(supervisor.stdin.fileno(), b"\n")
    supervisor.stdin.close()


def _cause(here: Place, engine_id: str) -> str:
    """The error that the last worker with this id reported, if any."""
    return str(_status(here, engine_id).get("error") or "")


def _undo(here: Place, engine_id: str, supervisor: subprocess.Popen[bytes]) -> None:
    """Stops supervisor and worker; returns once both are gone and the id is free for the next order."""
    child_process.stop(supervisor, here.settings.drain_grace_s + LEAVE_S)
    status = _status(here, engine_id)
    if _is_ours(here, status, supervisor.pid) and status["state"] not in _GONE:
        _kill_worker(here, status)
    log.info("the start of engine %s was undone", engine_id)


# -- an engine's status and processes


def _status(here: Place, engine_id: str) -> dict[str, Any]:
    """The engine's status; empty if there is no such engine. Waits for an unreachable Redis."""
    monitor = Monitor(here.settings, here.server)
    try:
        return persist(lambda: monitor.engine(engine_id), "node", lambda: False) or {}
    except UnknownCall:
        return {}


def _state(here: Place, engine_id: str) -> str:
    return str(_status(here, engine_id).get("state", ""))


def _require_here(here: Place, engine_id: str) -> None:
    """Raises EngineFailed if the engine runs on another host, where its pids belong to it; here they do not."""
    node = _status(here, engine_id).get("node", here.node)  # an unknown engine fails later, in the drain
    if node != here.node:
        raise EngineFailed(
            f"Engine {engine_id} runs on node {node}; stop it with `rsm stop {engine_id} --node {node}`."
        )


def _kill_worker(here: Place, status: dict[str, Any]) -> None:
    """Kills the worker, if it is alive, and moves its calls to other engines."""
    _kill_session(status["pid"])
    report_death(here.settings, status["engine_id"], str(status["incarnation"]))


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether the process is a zombie. In a container without an init process nobody reaps it."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "Z"


def _kill_session(pid: int) -> None:
    if _alive(pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
