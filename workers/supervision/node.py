"""A host as a place for engines: RQ runs the start, stop and drain of engines there, one job at a time.

That is RQ's part: work that takes minutes, is worth a time limit and a trace, and shows in `rq info`. What the jobs do
is in `node_jobs.py`. Neither a job's end nor a restart of `rsm node` touches a running engine.

An order is given to a node that listens now, and lasts as long as its giver waits for it (`orders.py`).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from functools import partial
from typing import Any

from rsm.broker.connection.eviction import require_noeviction_at
from rsm.broker.connection.factory import connect, connect_patiently
from rsm.broker.connection.retry import BLIPS, explained, persist
from rsm.broker.connection.topology import place_of
from rsm.broker.errors import EngineFailed, InvalidRequest
from rsm.broker.protocol.ids import check_id, new_id
from rsm.broker.settings import Settings
from rsm.workers.config import EngineConfig
from rsm.workers.supervision import node_jobs
from rsm.workers.supervision.node_jobs import JOBS, Place
from rsm.workers.supervision.orders import POLL_S, OrderLease

try:
    from rq import Queue, Worker
    from rq.job import Job, JobStatus
    from rq.results import Result
    from rq.serializers import JSONSerializer
    from rq.worker_registration import register
except ModuleNotFoundError as e:  # whoever asks for a node imports this module first, and shows the sentence
    raise InvalidRequest("Nodes need RQ, which is not installed: pip install 'rsm-engine[node]'.") from e

_RESULT_TTL_S = 3600
_FAILURE_TTL_S = 7 * 24 * 3600
# How long a giver waits between two looks at its order, and how often a node says that it listens.
_BLOCK_S = 2
_BEAT_S = 2
# A node that has said nothing for so long does not listen.
PRESENCE_S = 10
# A giver gives up after so many looks in a row, 10 s, that found its node gone: it may be starting again, or Redis may
# just have been away.
_LOOKS = 5
# What a job may take beyond the work itself.
_MARGIN_S = 60
# RQ waits for a job for so much less than what it calls the life of a worker.
_RQ_MARGIN_S = 15


# -- the node's side

_host: tuple[str, Settings] | None = None


def queue_name(settings: Settings, node: str) -> str:
    """The RQ queue of one host. A node worker listens to exactly one queue: with several, RQ can lose a job."""
    return f"rsm-node/{settings.namespace}/{check_id(node, 'node')}"  # no id holds a slash: no two hosts share one


def run_node(node: str, settings: Settings) -> None:
    """Serves this host's queue until SIGTERM; running engines stay. Raises EvictingRedis."""
    global _host
    require_noeviction_at(settings)
    require_one_keyspace(settings)
    _host = node, settings
    connection = connect_patiently(settings)
    NodeWorker(
        [Queue(queue_name(settings, node), connection=connection, serializer=JSONSerializer)],
        connection=connection,
        serializer=JSONSerializer,
        job_class=NodeJob,
        worker_ttl=_BEAT_S + _RQ_MARGIN_S,
        job_monitoring_interval=_BEAT_S,
    ).work()


def require_one_keyspace(settings: Settings) -> None:
    """Raises InvalidRequest on a Redis Cluster: RQ's keys share no hash tag, so they lie on several of its masters."""
    if place_of(settings.url(), settings.namespace).kind == "cluster":
        raise InvalidRequest(
            "RQ, by which nodes are asked to start engines, does not run on a Redis Cluster. Start `rsm worker` "
            "on that host by other means (it runs on a Cluster), or use one server or Sentinel."
        )


class NodeWorker(Worker):  # type: ignore[misc]  # RQ is untyped
    """Is registered while it listens. RQ itself keeps a worker that was killed registered for eight minutes."""

    max_connection_wait_time = float(_BEAT_S)

    def register_birth(self) -> None:
        super().register_birth()
        self.heartbeat()

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Registers it anew for a short time: its registration may have run out while it was stopped, or Redis away."""
        beat = self.connection.pipeline() if pipeline is None else pipeline
        beat.hset(self.key, mapping=self.serialize())
        register(self, beat)
        super().heartbeat(PRESENCE_S, beat)
        if pipeline is None:
            beat.execute()

    def maintain_heartbeats(self, job: Job, execution: Any) -> None:
        """A Redis that is away does not end a node, nor the job that it runs."""
        with contextlib.suppress(*BLIPS):
            super().maintain_heartbeats(job, execution)


class NodeJob(Job):  # type: ignore[misc]  # RQ is untyped
    """One of `node_jobs.JOBS`. RQ would run any function that a job names, and callbacks and webhooks as well: then
    whoever may write RQ's keys would own this host."""

    @property
    def func(self) -> Any:
        """Raises EngineFailed for a job that is none of ours."""
        if self.func_name not in JOBS:
            raise EngineFailed(
                "This node starts, stops and drains engines, replays dead letters, and does nothing else."
            )
        return JOBS[self.func_name]

    def perform(self) -> Any:
        """Raises EngineFailed if nobody waits for it, or in a process that is no node's."""
        job = self.func
        if _host is None:
            raise EngineFailed("This job runs on a node only: `rsm node`.")
        node, settings = _host
        lease = OrderLease(self.connection, settings, self.id)
        while not lease.look():
            time.sleep(POLL_S)
        self._result = job(Place(node, settings, self.connection, lease), *self.args, **self.kwargs)
        return self._result

    def restore(self, raw_data: Any) -> None:
        super().restore(raw_data)
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self.webhooks: list[Any] = []


# -- the giver's side


class NodeClient:
    """Asks a host to start, drain and stop engines, and waits for the answer.

    An order lasts as long as that wait. When it ends before the answer, by time or by an exception such as that of
    Ctrl-C, the order is withdrawn: if it has not begun it never does, and a start that is under way is undone. The same
    happens, some seconds later, if this process is killed. A stop or a drain that has begun goes on to its end.
    """

    def __init__(self, node: str, settings: Settings) -> None:
        self.node = node
        self._settings = settings
        self._grace_s = settings.drain_grace_s

    def start_engine(self, config: EngineConfig, timeout_s: float) -> dict[str, Any]:
        """Returns the engine's status once it is READY.

        Raises:
            EngineFailed: it did not come up, or that host does not listen.
            InvalidRequest: the config holds an API key: set RSM_OPENAI_API_KEY on that host instead.
        """
        if config.api_key is not None:
            raise InvalidRequest("An API key must not travel through a queue; set RSM_OPENAI_API_KEY on the node.")
        return self._run(node_jobs.start_engine, timeout_s, json.loads(config.as_json()), timeout_s)

    def stop_engine(self, engine_id: str, drain: bool = True) -> dict[str, Any]:
        """Stops an engine; with `drain` its running calls may finish within the grace. Raises EngineFailed."""
        return self._run(node_jobs.stop_engine, self._grace_s, engine_id, drain)

    def drain_engine(self, engine_id: str) -> dict[str, Any]:
        """Takes an engine out of service without stopping it. Raises EngineFailed."""
        return self._run(node_jobs.drain_engine, self._grace_s, engine_id)

    def replay(self, ref: str, within_s: float) -> dict[str, Any]:
        """Sends a dead call again, or with "" all that keep a body; returns `Replayed` as a map, or the new `id`.

        Raises:
            EngineFailed: it could not be sent, or the node does not listen, or did not answer within so many seconds.
        """
        return self._run(node_jobs.replay_letters, within_s, ref, margin_s=0)

    def _run(self, job: Any, work_s: float, *args: Any, margin_s: int = _MARGIN_S) -> dict[str, Any]:
        self._require_listening()
        limit = max(1, math.ceil(work_s) + margin_s)
        with connect(self._settings, block_s=_BLOCK_S) as connection:
            queue = Queue(queue_name(self._settings, self.node), connection=connection, serializer=JSONSerializer)
            order = new_id()
            lease = OrderLease(connection, self._settings, order)
            try:
                with explained(self._settings):
                    lease.renew()
                queued = queue.enqueue(
                    job,
                    args=args,
                    job_id=order,
                    description=f"{job.__name__} on {self.node}",  # RQ logs it; its own would quote the arguments
                    ttl=limit,
                    job_timeout=limit,
                    result_ttl=_RESULT_TTL_S,
                    failure_ttl=_FAILURE_TTL_S,
                )
                result = self._await(queued, lease, limit)
            finally:
                _withdraw(queue, order, lease)
        return self._value(result)

    def _require_listening(self) -> None:
        nodes = listening(self._settings)
        if self.node not in nodes:
            raise EngineFailed(
                f"Node {self.node} does not listen (listening: {', '.join(nodes) or 'none'}); start "
                f"`rsm node --name {self.node}` on that host."
            )

    def _await(self, queued: Job, lease: OrderLease, limit_s: float) -> Result:
        """The result of a job. Redis may be away for a while meanwhile.

        Raises:
            EngineFailed: there is none within so many seconds, or the node is gone.
        """
        until, absent = time.monotonic() + limit_s, 0
        while (left := until - time.monotonic()) > 0:
            look = partial(self._look, queued, lease, math.ceil(min(left, _BLOCK_S)))
            found = persist(look, "node", lambda: False, limit_s)
            if isinstance(found, Result):
                return found
            absent = 0 if found else absent + 1
            if absent >= _LOOKS:
                raise EngineFailed(f"Node {self.node} stopped listening before it answered; the order is withdrawn.")
        raise EngineFailed(f"Node {self.node} did not answer within {limit_s:g} s; the order is withdrawn.")

    def _look(self, queued: Job, lease: OrderLease, block_s: int) -> Result | bool:
        """The result, or else, after so many seconds, whether the node is there."""
        lease.renew()
        return queued.latest_result(timeout=block_s) or self.node in _registered(self._settings)

    def _value(self, result: Result) -> dict[str, Any]:
        if result.type != Result.Type.SUCCESSFUL:
            raise EngineFailed(_last_line(result.exc_string) or f"The job failed on node {self.node}.")
        value: dict[str, Any] = result.return_value
        return value


def listening(settings: Settings) -> list[str]:
    """The nodes of this namespace that listen now. One that was killed is among them for `PRESENCE_S` at most."""
    require_one_keyspace(settings)
    with explained(settings):
        return _registered(settings)


def _registered(settings: Settings) -> list[str]:
    prefix = queue_name(settings, "-").removesuffix("-")
    with connect(settings) as connection:
        queues = [name for worker in Worker.all(connection=connection) for name in worker.queue_names()]
    return sorted({name.removeprefix(prefix) for name in queues if name.startswith(prefix)})


def _waits(queue: Queue, order: str) -> bool:
    """Whether nobody has begun it."""
    job = queue.fetch_job(order)
    return job is not None and job.get_status(refresh=False) == JobStatus.QUEUED


def _withdraw(queue: Queue, order: str, lease: OrderLease) -> None:
    """After its end it changes nothing. Where Redis is away, the lease runs out."""
    with contextlib.suppress(*BLIPS):
        lease.end()
        if _waits(queue, order):
            queue.fetch_job(order).delete()


def _last_line(trace: str | None) -> str:
    lines = (trace or "").strip().splitlines()
    return lines[-1].partition(": ")[2] if lines else ""
