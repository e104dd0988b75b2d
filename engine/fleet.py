"""A whole deployment on this machine: Redis if embedded, routers, and one worker process per engine, supervised.

`MultiEngineManager`, `EngineProcess`, `rsm up` and the demo are all this one thing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence

from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.eviction import require_noeviction_at
from rsm.broker.connection.retry import BLIPS
from rsm.broker.errors import EngineFailed, UnknownCall
from rsm.broker.protocol.models import EngineState
from rsm.broker.settings import Settings
from rsm.broker.views.monitor import Monitor
from rsm.router.policies import create_policy
from rsm.workers.config import EngineConfig
from rsm.workers.supervision.launch import report_death, worker_process
from rsm.workers.supervision.supervisor import Supervised

log = logging.getLogger("rsm.fleet")

# Loading a large model takes minutes.
START_TIMEOUT_S = 900.0
_POLL_S = 0.05


class Fleet:
    """Brings the parts up and down.

    Args:
        settings: without a Redis URL the fleet starts a private embedded server, in `settings.data_dir` if that is
            set, else in a temporary folder that goes with it.
        routers: how many router processes.
        output: where the children write their logs; none = this process's stdout and stderr.
    """

    def __init__(self, settings: Settings | None = None, *, routers: int = 1, output: int | None = None) -> None:
        given = settings or Settings()
        self.embedded = EmbeddedRedis(given.data_dir) if given.redis_url is None else None
        self.settings = given if self.embedded is None else given.with_redis(self.embedded.url)
        self._router_count = routers
        self._output = output
        self.routers: list[Supervised] = []
        self.workers: dict[str, Supervised] = {}

    def start(self, engines: Sequence[EngineConfig], timeout_s: float = START_TIMEOUT_S) -> None:
        """Starts everything; returns once all engines are READY.

        Raises:
            EngineFailed: an engine did not come up; everything is stopped again.
            BrokerUnavailable: no Redis.
            EvictingRedis: Redis would delete calls when its memory is full.
            InvalidRequest: there is no such routing policy.
        """
        if self._router_count:
            create_policy(self.settings)  # routers without one would end at once, and calls wait for ever
        try:
            if self.embedded is not None:
                self.embedded.start()
            with contextlib.suppress(*BLIPS):  # the parts wait for it, and look themselves
                require_noeviction_at(self.settings)
            for i in range(self._router_count):
                self.start_router(f"router {i}")
            for config in engines:
                self.add(config)
            for config in engines:
                self.wait_ready(config.engine_id, timeout_s)
        except BaseException:
            self.stop()
            raise

    def start_router(self, name: str) -> Supervised:
        command, env = [sys.executable, "-P", "-m", "rsm.router"], self.settings.environment()
        router = Supervised(name, command, env, give_up=[os.EX_CONFIG], output=self._output)
        router.start()
        self.routers.append(router)
        return router

    def add(self, config: EngineConfig) -> None:
        """Starts a worker for one more engine; does not wait for it."""
        if config.engine_id in self.workers:
            raise EngineFailed(f"Engine {config.engine_id} is part of this fleet already; choose another engine_id.")
        worker = worker_process(config, self.settings, output=self._output)
        worker.start()
        self.workers[config.engine_id] = worker

    def remove(self, engine_id: str, drain: bool = True) -> None:
        """Stops an engine's worker. With `drain` its running calls may finish first; else others run them again."""
        worker = self.workers.pop(engine_id, None)
        if worker is None:
            raise EngineFailed(f"Engine {engine_id} is not part of this fleet.")
        if drain:
            worker.stop()
        else:
            pid = worker.kill()
            report_death(self.settings, engine_id, pid)

    def wait_ready(self, engine_id: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Waits until an engine takes calls.

        Raises:
            EngineFailed: its worker gave up, or time is up.
        """
        monitor = Monitor(self.settings)
        until = time.monotonic() + timeout_s
        while not _is_ready(monitor, engine_id):
            worker = self.workers.get(engine_id)
            if worker is None or not worker.running:
                status = worker.status if worker else None
                raise EngineFailed(f"Engine {engine_id} did not start (exit status {status}); its log says why.")
            if worker.restarts > 2:
                raise EngineFailed(f"Engine {engine_id} failed to start {worker.restarts} times; its log says why.")
            if time.monotonic() > until:
                raise EngineFailed(f"Engine {engine_id} was not ready after {timeout_s:g} s.")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Stops everything, bounded: workers drain at once side by side, then routers, then Redis."""
        self.stop_parts()
        if self.embedded is not None:
            self.embedded.stop()

    def stop_parts(self) -> None:
        """Stops all but Redis."""
        for worker in self.workers.values():
            worker.request_stop()
        for worker in self.workers.values():
            worker.stop()
        self.workers.clear()
        for router in self.routers:
            router.stop()
        self.routers.clear()


def _is_ready(monitor: Monitor, engine_id: str) -> bool:
    try:
        return bool(monitor.engine(engine_id)["state"] == EngineState.READY)
    except UnknownCall:
        return False
