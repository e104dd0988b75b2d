"""A whole deployment on this machine: Redis if embedded, routers, and one supervised worker process per engine.

`MultiEngineManager`, `EngineProcess`, `rsm up` and the demo all use it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.eviction import require_noeviction_at
from rsm.broker.connection.retry import OUTAGES, no_answer, persist
from rsm.broker.errors import BrokerUnavailable, EngineFailed, UnknownCall
from rsm.broker.protocol.models import EngineState
from rsm.broker.settings import Settings
from rsm.broker.views.monitor import Monitor
from rsm.router.policies import create_policy
from rsm.workers.backends.vllm.start.gpus import on_gpu
from rsm.workers.config import EngineConfig
from rsm.workers.environment import EXIT_ID_TAKEN
from rsm.workers.supervision.launch import is_of, report_death, worker_process
from rsm.workers.supervision.supervisor import Supervised

log = logging.getLogger("rsm.fleet")

# Loading a large model takes minutes.
START_TIMEOUT_S = 900.0
_POLL_S = 0.05
_REDIS_S = 5.0
# How often an engine is started if it ends before it is ready, for a reason that may be temporary.
_TRIES = 3
_PROGRESS = {"STARTING": "loads its model", "READY": "is ready"}


class Fleet:
    """Starts and stops the processes of a deployment.

    Args:
        settings: without a Redis URL the fleet starts a private embedded server, in `settings.data_dir` if that is
            set, otherwise in a temporary folder.
        routers: the number of router processes.
        output: where the child processes write their logs. Default: this process's stdout and stderr.
    """

    def __init__(self, settings: Settings | None = None, *, routers: int = 1, output: int | None = None) -> None:
        given = settings or Settings()
        self.embedded = EmbeddedRedis(given.data_dir) if given.redis_url is None else None
        self.settings = given if self.embedded is None else given.with_redis(self.embedded.url)
        self._router_count = routers
        self._output = output
        self._progress: Callable[[str], None] = lambda _: None
        self.routers: list[Supervised] = []
        self.workers: dict[str, Supervised] = {}

    def start(
        self,
        engines: Sequence[EngineConfig],
        timeout_s: float = START_TIMEOUT_S,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Starts everything; returns once all engines are READY.

        Args:
            progress: called with a short description of each step.

        Raises:
            EngineFailed: an engine did not start; the message says why. Everything is stopped again.
            BrokerUnavailable: no Redis.
            EvictingRedis: Redis would delete calls when its memory is full.
            InvalidRequest: there is no such routing policy.
        """
        if self._router_count:
            create_policy(self.settings)  # without one, routers would end at once and calls wait forever
        self._progress = progress
        try:
            if self.embedded is not None:
                progress("starting Redis")
                self.embedded.start()
            self._require_redis()
            progress("starting the router")
            for i in range(self._router_count):
                self.start_router(f"router {i}")
            self._start_engines(engines, timeout_s)
        except BaseException:
            self.stop()
            raise

    def _require_redis(self) -> None:
        """Waits a short time for Redis, which may still be starting. The child processes would wait forever.

        Raises:
            BrokerUnavailable: Redis is not reachable.
            EvictingRedis: it would delete calls.
        """
        try:
            persist(
                lambda: require_noeviction_at(self.settings), "fleet", lambda: False, _REDIS_S, denial_is_final=True
            )
        except OUTAGES as e:
            raise no_answer(self.settings, _REDIS_S, e) from None

    def _start_engines(self, engines: Sequence[EngineConfig], timeout_s: float) -> None:
        """Starts all engines at once, but those that share a GPU one by one, because each measures its free memory."""
        waiting: list[EngineConfig] = []
        for config in engines:
            for other in [o for o in waiting if on_gpu() and config.shares_gpu_with(o)]:
                self.wait_ready(other.engine_id, timeout_s)
                waiting.remove(other)
            self.add(config)
            waiting.append(config)
        for config in waiting:
            self.wait_ready(config.engine_id, timeout_s)

    def start_router(self, name: str) -> Supervised:
        command, env = [sys.executable, "-P", "-m", "rsm.router"], self.settings.environment()
        router = Supervised(name, command, env, give_up=[os.EX_CONFIG], output=self._output)
        router.start()
        self.routers.append(router)
        return router

    def add(self, config: EngineConfig) -> None:
        """Starts a worker for one more engine. Does not wait for it."""
        if config.engine_id in self.workers:
            raise EngineFailed(f"Engine {config.engine_id} is already part of this fleet; choose another engine_id.")
        worker = worker_process(config, self.settings, output=self._output)
        worker.start()
        self.workers[config.engine_id] = worker

    def remove(self, engine_id: str, drain: bool = True) -> None:
        """Stops an engine's worker. With `drain` its running calls may finish; otherwise other engines rerun them."""
        worker = self.workers.pop(engine_id, None)
        if worker is None:
            raise EngineFailed(f"Engine {engine_id} is not part of this fleet.")
        if drain:
            worker.stop()
        else:
            report_death(self.settings, engine_id, worker.kill())

    def wait_ready(self, engine_id: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Waits until the worker of this fleet is READY. Another fleet's engine with the same id does not count.

        Raises:
            EngineFailed: its worker gave up, or the time is over; the message says why.
        """
        monitor, shown = Monitor(self.settings), ""
        until = time.monotonic() + timeout_s
        while True:
            worker, found = self.workers.get(engine_id), _status(monitor, engine_id)
            if worker is None:
                raise EngineFailed(f"Engine {engine_id} is not part of this fleet.")
            own = found if is_of(str(found.get("incarnation", "")), worker.birth) else {}
            state = str(own.get("state", "")) or "is loading"
            if state != shown:
                shown = state
                self._progress(f"engine {engine_id} {_PROGRESS.get(state, state)}")
            if state == EngineState.READY:
                return
            self._require_routers()
            if not worker.running or worker.restarts + 1 > _TRIES:
                raise EngineFailed(_failure(engine_id, worker, found))
            if time.monotonic() > until:
                tried = f" It ended {worker.restarts} times: {found.get('error')}" if worker.restarts else ""
                raise EngineFailed(f"Engine {engine_id} was not ready after {timeout_s:g} s.{tried}")
            time.sleep(_POLL_S)

    def _require_routers(self) -> None:
        """Raises EngineFailed if a router of this fleet has given up, because no call would ever be placed."""
        for router in self.routers:
            if not router.running:
                raise EngineFailed(
                    f"The {router.name.partition(' ')[0]} ended with status {router.status}; its log says why. "
                    "Check Redis and the settings with `rsm doctor`."
                )

    def stop(self) -> None:
        """Stops everything within a time limit: first all workers at once, then routers, then Redis."""
        self.stop_processes()
        if self.embedded is not None:
            self.embedded.stop()

    def stop_processes(self) -> None:
        """Stops everything except Redis."""
        for worker in self.workers.values():
            worker.request_stop()
        for worker in self.workers.values():
            worker.stop()
        self.workers.clear()
        for router in self.routers:
            router.stop()
        self.routers.clear()


def _status(monitor: Monitor, engine_id: str) -> dict[str, Any]:
    """The engine's record; {} if there is none or Redis is unreachable."""
    try:
        return monitor.engine(engine_id)
    except (UnknownCall, BrokerUnavailable):
        return {}


def _failure(engine_id: str, worker: Supervised, found: Mapping[str, Any]) -> str:
    """The error message for an engine that did not start."""
    if worker.status == EXIT_ID_TAKEN:
        holder = f" (pid {found['pid']} on {found['node']})" if found else ""
        return (
            f"Engine id {engine_id} is in use by another live worker{holder}. "
            "Stop that worker, choose another engine_id, or use a namespace of your own (RSM_NAMESPACE)."
        )
    cause = found.get("error") or f"its process ended with status {worker.status}; its log says why."
    tried = f" (tried {worker.restarts} times)" if worker.restarts else ""
    return f"Engine {engine_id} did not start{tried}: {cause}"
