"""A host that runs engines. RQ runs the jobs that start, stop and drain them there, one at a time.

RQ suits these jobs: they take minutes, need a time limit and a trace, and show in `rq info`. The jobs themselves are
in `node_jobs.py`. Neither the end of a job nor a restart of `rsm node` touches a running engine.

An order goes to a node that listens now, and is valid as long as its client waits for it (`orders.py`).
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
from rsm.broker.connection.retry import OUTAGES, explained, persist
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
except ModuleNotFoundError as e:  # the caller imports this module first and shows the message
    raise InvalidRequest("Nodes need RQ, which is not installed: pip install 'rsm-engine[node]'.") from e

_RESULT_TTL_S = 3600
_FAILURE_TTL_S = 7 * 24 * 3600
# How long a client waits between two checks of its order, and how often a node reports that it listens.
_BLOCK_S = 2
_BEAT_S = 2
# A node that has not reported for this long counts as not listening.
PRESENCE_S = 10
# A client gives up after this many checks in a row (10 s) without its node. Fewer could be a restart of the node or a
# brief outage of Redis.
_MAX_ABSENT = 5
# The time limit of a job, beyond the work itself.
_MARGIN_S = 60
# RQ blocks for a job this much less than its worker TTL.
_RQ_MARGIN_S = 15


# -- the node

_host: tuple[str, Settings] | None = None


def queue_name(settings: Settings, node: str) -> str:
    """The RQ queue of one host. A node worker listens to exactly one queue: with several, RQ can lose a job."""
    return f"rsm-node/{settings.namespace}/{check_id(node, 'node')}"  # ids have no slash, so no two hosts share a queue


def run_node(node: str, settings: Settings) -> None:
    """Serves this host's queue until SIGTERM; running engines keep running. Raises EvictingRedis."""
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
    """Raises InvalidRequest on a Redis Cluster: RQ's keys have no common hash tag, so they are on several masters."""
    if place_of(settings.url(), settings.namespace).kind == "cluster":
        raise InvalidRequest(
            "Nodes need RQ, which does not run on a Redis Cluster. Start `rsm worker` on that host yourself (it runs "
            "on a Cluster), or use a single Redis server or Sentinel."
        )


class NodeWorker(Worker):  # type: ignore[misc]  # RQ is untyped
    """An RQ worker that is registered only while it listens. RQ keeps a killed worker registered for eight minutes."""

    max_connection_wait_time = float(_BEAT_S)

    def register_birth(self) -> None:
        super().register_birth()
        self.heartbeat()

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Renews the registration, which may have expired while the process was stopped or Redis was unreachable."""
        beat = self.connection.pipeline() if pipeline is None else pipeline
        beat.hset(self.key, mapping=self.serialize())
        register(self, beat)
        super().heartbeat(PRESENCE_S, beat)
        if pipeline is None:
            beat.execute()

    def maintain_heartbeats(self, job: Job, execution: Any) -> None:
        """Ignores outages of Redis, so that they end neither the node nor its job."""
        with contextlib.suppress(*OUTAGES):
            super().maintain_heartbeats(job, execution)


class NodeJob(Job):  # type: ignore[misc]  # RQ is untyped
    """One of `node_jobs.JOBS`. RQ would run any function, callback and webhook that a job names, so anyone who can
    write RQ's keys would own this host."""

    @property
    def func(self) -> Any:
        """Raises EngineFailed for a job that is not in `JOBS`."""
        if self.func_name not in JOBS:
            raise EngineFailed(
                "This job is unknown. A node only starts, stops and drains engines and replays dead letters."
            )
        return JOBS[self.func_name]

    def perform(self) -> Any:
        """Raises EngineFailed if no client waits for it, or if this process is not a node."""
        job = self.func
        if _host is None:
            raise EngineFailed("This job runs only on a node; start one with `rsm node`.")
        node, settings = _host
        lease = OrderLease(self.connection, settings, self.id)
        while not lease.check():
            time.sleep(POLL_S)
        self._result = job(Place(node, settings, self.connection, lease), *self.args, **self.kwargs)
        return self._result

    def restore(self, raw_data: Any) -> None:
        super().restore(raw_data)
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self.webhooks: list[Any] = []


# -- the client


class NodeClient:
    """Sends a host orders to start, drain and stop engines, and waits for the answer.

    An order is valid as long as that wait. If the wait ends before the answer, by a timeout or an exception such as
    Ctrl-C, the order is withdrawn: a queued order never begins, and a start in progress is undone. The same happens
    some seconds after this process is killed. A stop or a drain in progress is completed.
    """

    def __init__(self, node: str, settings: Settings) -> None:
        self.node = node
        self._settings = settings
        self._grace_s = settings.drain_grace_s

    def start_engine(self, config: EngineConfig, timeout_s: float) -> dict[str, Any]:
        """Returns the engine's status once it is READY.

        Raises:
            EngineFailed: it did not start, or that host does not listen.
            InvalidRequest: the config holds an API key: set RSM_OPENAI_API_KEY on that host instead.
        """
        if config.api_key is not None:
            raise InvalidRequest("An API key must not be sent through a queue; set RSM_OPENAI_API_KEY on the node.")
        return self._run(node_jobs.start_engine, timeout_s, json.loads(config.as_json()), timeout_s)

    def stop_engine(self, engine_id: str, drain: bool = True) -> dict[str, Any]:
        """Stops an engine; with `drain` its running calls may finish within the grace period. Raises EngineFailed."""
        return self._run(node_jobs.stop_engine, self._grace_s, engine_id, drain)

    def drain_engine(self, engine_id: str) -> dict[str, Any]:
        """Drains an engine without stopping it. Raises EngineFailed."""
        return self._run(node_jobs.drain_engine, self._grace_s, engine_id)

    def replay(self, ref: str, within_s: float) -> dict[str, Any]:
        """Replays a dead call, or with "" all that still have a body; returns `Replayed` as a map, or the new `id`.

        Raises:
            EngineFailed: it could not be sent, or the node does not listen, or did not answer within `within_s`.
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
                    description=f"{job.__name__} on {self.node}",  # RQ logs it; its default quotes the arguments
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
                f"Node {self.node} is not listening (listening: {', '.join(nodes) or 'none'}); start "
                f"`rsm node --name {self.node}` on that host."
            )

    def _await(self, queued: Job, lease: OrderLease, limit_s: float) -> Result:
        """Waits for the result of a job, also through an outage of Redis.

        Raises:
            EngineFailed: there is none within `limit_s` seconds, or the node is gone.
        """
        until, absent = time.monotonic() + limit_s, 0
        while (left := until - time.monotonic()) > 0:
            poll = partial(self._poll, queued, lease, math.ceil(min(left, _BLOCK_S)))
            found = persist(poll, "node", lambda: False, limit_s)
            if isinstance(found, Result):
                return found
            absent = 0 if found else absent + 1
            if absent >= _MAX_ABSENT:
                raise EngineFailed(f"Node {self.node} stopped listening before it answered; the order is withdrawn.")
        raise EngineFailed(f"Node {self.node} did not answer within {limit_s:g} s; the order is withdrawn.")

    def _poll(self, queued: Job, lease: OrderLease, block_s: int) -> Result | bool:
        """Waits at most `block_s` seconds for the result; without one, returns whether the node is registered."""
        lease.renew()
        return queued.latest_result(timeout=block_s) or self.node in _registered(self._settings)

    def _value(self, result: Result) -> dict[str, Any]:
        if result.type != Result.Type.SUCCESSFUL:
            raise EngineFailed(_last_line(result.exc_string) or f"The job failed on node {self.node}.")
        value: dict[str, Any] = result.return_value
        return value


def listening(settings: Settings) -> list[str]:
    """The nodes of this namespace that listen now. A killed node is listed for at most `PRESENCE_S` more seconds."""
    require_one_keyspace(settings)
    with explained(settings):
        return _registered(settings)


def _registered(settings: Settings) -> list[str]:
    prefix = queue_name(settings, "-").removesuffix("-")
    with connect(settings) as connection:
        queues = [name for worker in Worker.all(connection=connection) for name in worker.queue_names()]
    return sorted({name.removeprefix(prefix) for name in queues if name.startswith(prefix)})


def _is_queued(queue: Queue, order: str) -> bool:
    """Whether the job has not begun."""
    job = queue.fetch_job(order)
    return job is not None and job.get_status(refresh=False) == JobStatus.QUEUED


def _withdraw(queue: Queue, order: str, lease: OrderLease) -> None:
    """Withdraws an order. No effect if the job has ended; if Redis is unreachable, the lease expires instead."""
    with contextlib.suppress(*OUTAGES):
        lease.end()
        if _is_queued(queue, order):
            queue.fetch_job(order).delete()


def _last_line(trace: str | None) -> str:
    lines = (trace or "").strip().splitlines()
    return lines[-1].partition(": ")[2] if lines else ""
