"""A host as a place for engines: RQ runs the start, stop and drain of engines there, one job at a time.

That is RQ's part: work that takes minutes, is worth a time limit and a trace, and shows in `rq info`. The engines it
starts are no children of RQ's work-horse: each is a detached supervisor with its worker, so neither a job's end nor a
restart of `rsm node` touches a running engine.
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

from rsm.broker.connection import execute
from rsm.broker.connection.eviction import require_noeviction_at
from rsm.broker.connection.factory import connect, connect_patiently
from rsm.broker.connection.retry import persist
from rsm.broker.connection.topology import place_of
from rsm.broker.errors import EngineFailed, InvalidRequest, UnknownCall
from rsm.broker.protocol.ids import check_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.models import EngineState
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.monitor import Monitor
from rsm.workers.config import EngineConfig
from rsm.workers.environment import CONFIG_VARIABLE, NODE_VARIABLE, SUPERVISED_FLAG
from rsm.workers.supervision.launch import report_death

try:
    from rq import Queue, Worker
    from rq.job import Job
    from rq.results import Result
    from rq.serializers import JSONSerializer
except ModuleNotFoundError as e:  # whoever asks for a node imports this module first, and shows the sentence
    raise InvalidRequest("Nodes need RQ, which is not installed: pip install 'rsm-engine[node]'.") from e

log = logging.getLogger("rsm.node")

_RESULT_TTL_S = 3600
_FAILURE_TTL_S = 7 * 24 * 3600
_POLL_S = 0.1
_BLOCK_S = 2
# What a job may take beyond the work itself.
_MARGIN_S = 60
_GONE = (EngineState.STOPPED, EngineState.DEAD, "")


@dataclass(frozen=True, slots=True)
class Host:
    """What the jobs, which run in forks of the node's process, know of the place where they run."""

    node: str
    settings: Settings


_host: Host | None = None


def _here() -> Host:
    """Raises EngineFailed in a process that is no node's."""
    if _host is None:
        raise EngineFailed("This job runs on a node only: `rsm node`.")
    return _host


def queue_name(settings: Settings, node: str) -> str:
    """The RQ queue of one host. A node worker listens to exactly one queue: with several, RQ can lose a job."""
    return f"rsm-node/{settings.namespace}/{check_id(node, 'node')}"  # no id holds a slash: no two hosts share one


def run_node(node: str, settings: Settings) -> None:
    """Serves this host's queue until SIGTERM; running engines stay. Raises EvictingRedis."""
    global _host
    require_noeviction_at(settings)
    require_one_keyspace(settings)
    _host = Host(node, settings)
    connection = connect_patiently(settings)
    queue = Queue(queue_name(settings, node), connection=connection, serializer=JSONSerializer)
    Worker([queue], connection=connection, serializer=JSONSerializer, job_class=NodeJob).work()


def require_one_keyspace(settings: Settings) -> None:
    """Raises InvalidRequest on a Redis Cluster: RQ's keys share no hash tag, so they lie on several of its masters."""
    if place_of(settings.url(), settings.namespace).kind == "cluster":
        raise InvalidRequest(
            "RQ, by which nodes are asked to start engines, does not run on a Redis Cluster. Start `rsm worker` "
            "on that host by other means (it runs on a Cluster), or use one server or Sentinel."
        )


class NodeJob(Job):  # type: ignore[misc]  # RQ is untyped
    """One of this module's jobs. RQ would run any function that a job names, and callbacks and webhooks as well: then
    whoever may write RQ's keys would own this host."""

    @property
    def func(self) -> Any:
        """Raises EngineFailed for a job that is none of ours."""
        if self.func_name not in _JOBS:
            raise EngineFailed(
                "This node starts, stops and drains engines, replays dead letters, and does nothing else."
            )
        return _JOBS[self.func_name]

    def restore(self, raw_data: Any) -> None:
        super().restore(raw_data)
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self.webhooks: list[Any] = []


class NodeClient:
    """Asks a host to start, drain and stop engines, and waits for the answer."""

    def __init__(self, node: str, settings: Settings) -> None:
        self.node = node
        self._settings = settings
        self._grace_s = settings.drain_grace_s

    def start_engine(self, config: EngineConfig, timeout_s: float) -> dict[str, Any]:
        """Returns the engine's status once it is READY.

        Raises:
            EngineFailed: it did not come up, or nobody serves that host's queue.
            InvalidRequest: the config holds an API key: set RSM_OPENAI_API_KEY on that host instead.
        """
        if config.api_key is not None:
            raise InvalidRequest("An API key must not travel through a queue; set RSM_OPENAI_API_KEY on the node.")
        return self._run(start_engine, timeout_s, config.model_dump(mode="json", exclude={"api_key"}), timeout_s)

    def stop_engine(self, engine_id: str, drain: bool = True) -> dict[str, Any]:
        """Stops an engine; with `drain` its running calls may finish within the grace. Raises EngineFailed."""
        return self._run(stop_engine, self._grace_s, engine_id, drain)

    def drain_engine(self, engine_id: str) -> dict[str, Any]:
        """Takes an engine out of service without stopping it. Raises EngineFailed."""
        return self._run(drain_engine, self._grace_s, engine_id)

    def replay(self, ref: str, within_s: float) -> dict[str, Any]:
        """Sends a dead call again, or with "" all that keep a body; returns `Replayed` as a map, or the new `id`.

        Raises:
            EngineFailed: it could not be sent, or the node did not answer within so many seconds.
        """
        return self._run(replay_letters, within_s, ref, margin_s=0)

    def _run(self, job: Any, work_s: float, *args: Any, margin_s: int = _MARGIN_S) -> dict[str, Any]:
        require_one_keyspace(self._settings)
        limit = int(work_s) + margin_s
        with connect(self._settings, block_s=_BLOCK_S) as connection:
            queue = Queue(queue_name(self._settings, self.node), connection=connection, serializer=JSONSerializer)
            queued = queue.enqueue(
                job,
                args=args,
                description=f"{job.__name__} on {self.node}",  # RQ logs it; its own would quote the arguments
                job_timeout=limit,
                result_ttl=_RESULT_TTL_S,
                failure_ttl=_FAILURE_TTL_S,
            )
            result = _await(queued, limit)
            if result is None:
                queued.cancel()
        if result is None:
            raise EngineFailed(
                f"Node {self.node} did not answer within {limit} s. Is `rsm node --name {self.node}` running?"
            )
        if result.type != Result.Type.SUCCESSFUL:
            raise EngineFailed(_last_line(result.exc_string) or f"The job failed on node {self.node}.")
        value: dict[str, Any] = result.return_value
        return value


def listening(settings: Settings) -> list[str]:
    """The nodes of this namespace that RQ knows to listen. One that was killed is among them for some minutes."""
    require_one_keyspace(settings)
    prefix = queue_name(settings, "-").removesuffix("-")
    with connect(settings) as connection:
        queues = [name for worker in Worker.all(connection=connection) for name in worker.queue_names()]
    return sorted({name.removeprefix(prefix) for name in queues if name.startswith(prefix)})


def _await(job: Job, limit_s: float) -> Result | None:
    """The result of a job, None if it has none within `limit_s` seconds. Redis may be away for a while meanwhile."""
    until = time.monotonic() + limit_s
    result = None
    while result is None and time.monotonic() < until:
        result = persist(lambda: job.latest_result(timeout=_BLOCK_S), "node", lambda: False, limit_s)
    return result


def _last_line(trace: str | None) -> str:
    lines = (trace or "").strip().splitlines()
    return lines[-1].partition(": ")[2] if lines else ""


# -- the jobs; they run in RQ's work-horse on the node


def start_engine(config: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """RQ job: starts a detached, supervised worker on this host; returns its status once it is READY."""
    engine, here = EngineConfig(**config), _here()
    settings = here.settings
    if _state(settings, engine.engine_id) in (EngineState.STARTING, EngineState.READY, EngineState.DRAINING):
        raise EngineFailed(f"Engine id {engine.engine_id} is in use; stop that engine, or choose another id.")
    supervisor = subprocess.Popen(
        [sys.executable, "-P", "-m", "rsm.workers", SUPERVISED_FLAG],
        env=os.environ | settings.environment() | {CONFIG_VARIABLE: engine.model_dump_json(), NODE_VARIABLE: here.node},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # RQ ends a job by killing its process group
    )
    until = time.monotonic() + timeout_s
    while _state(settings, engine.engine_id) != EngineState.READY:
        if supervisor.poll() is not None:
            raise EngineFailed(f"Engine {engine.engine_id} did not start (exit status {supervisor.returncode}).")
        if time.monotonic() > until:
            supervisor.terminate()
            raise EngineFailed(f"Engine {engine.engine_id} was not ready after {timeout_s:g} s.")
        time.sleep(_POLL_S)
    log.info("engine %s started", engine.engine_id)
    return Monitor(settings).engine(engine.engine_id)


def stop_engine(engine_id: str, drain: bool) -> dict[str, Any]:
    """RQ job: stops an engine of this host; one that does not leave within the grace is killed."""
    settings = _here().settings
    _require_here(settings, engine_id)
    status = drain_engine(engine_id, "stop")
    supervisor, worker = int(status["supervisor"]), int(status["pid"])
    until = time.monotonic() + (settings.drain_grace_s + _MARGIN_S / 2 if drain else 0)
    while _alive(supervisor) or _alive(worker) or _state(settings, engine_id) not in _GONE:
        if time.monotonic() > until:
            _kill_session(supervisor)  # first, for it would start the worker again
            _kill_session(worker)
            report_death(settings, engine_id, worker)
        time.sleep(_POLL_S)
    log.info("engine %s stopped", engine_id)
    return Monitor(settings).engine(engine_id)


def drain_engine(engine_id: str, op: str = "drain") -> dict[str, Any]:
    """RQ job: takes an engine out of service; its waiting calls go to others."""
    check_id(engine_id, "engine")
    settings = _here().settings
    server, transitions = connect(settings), Transitions(Keys(settings.namespace), settings)
    while True:
        moved = execute.run(server, transitions.drain(engine_id, op))
        if moved < 0:
            raise EngineFailed(f"There is no live engine {engine_id} to {op}.")
        if moved < settings.batch:
            return Monitor(settings, server).engine(engine_id)


def replay_letters(ref: str) -> dict[str, Any]:
    """RQ job: sends the call of one dead letter again, or with "" all of them."""
    letters = DeadLetters(_here().settings)
    if not ref:
        return letters.replay_all()._asdict()
    return {"id": letters.replay(ref)}


_JOBS = {
    f"{job.__module__}.{job.__qualname__}": job for job in (start_engine, stop_engine, drain_engine, replay_letters)
}


def _state(settings: Settings, engine_id: str) -> str:
    try:
        return str(Monitor(settings).engine(engine_id)["state"])
    except UnknownCall:
        return ""


def _require_here(settings: Settings, engine_id: str) -> None:
    """Its pids mean something on its own host alone: elsewhere they are those of strangers."""
    try:
        node = Monitor(settings).engine(engine_id)["node"]
    except UnknownCall:
        return  # the order to drain says so
    if node != _here().node:
        raise EngineFailed(f"Engine {engine_id} runs on node {node}; ask that one to stop it.")


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
