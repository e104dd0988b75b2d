"""The worker: one process, one engine.

1. Takes its engine id (or refuses to start, if another live worker has it) and holds the lease.
2. Starts the engine, then claims calls that it can start, runs them and publishes chunks and results.
3. Carries out cancel flags, drain and stop.
4. Loses no call: on stop it lets calls finish within the grace period and releases the rest; when its engine dies it
   releases all of them and exits, and its supervisor restarts it.

It is worse to lose a call than to run it twice: a call leaves Redis's running set only with a result, or for a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from rsm.broker.connection import execute
from rsm.broker.connection.eviction import require_noeviction
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import OUTAGES
from rsm.broker.errors import EngineIdTaken
from rsm.broker.protocol.ids import check_id, new_id, shorten
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.messages import Claimed
from rsm.broker.protocol.models import EngineState
from rsm.broker.protocol.scripts import Arg, Command, T
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings
from rsm.workers.backends.base import Backend, EngineDied, EngineFacts, EngineMisconfigured
from rsm.workers.environment import EXIT_ENGINE_DIED, EXIT_INVALID, EXIT_OK
from rsm.workers.meters.kv_cache import CacheMeter
from rsm.workers.runtime.blocking import in_thread, until_answered
from rsm.workers.runtime.calls import Calls
from rsm.workers.runtime.claimer import Claimer, Slots
from rsm.workers.runtime.control import Control
from rsm.workers.runtime.lease import Lease
from rsm.workers.runtime.publisher import Publisher, Wake
from rsm.workers.runtime.reconciler import Reconciler
from rsm.workers.runtime.watchdog import HardExitTimer, ProgressWatchdog, check_interval_s
from rsm.workers.scheduling.service import create_unit

log = logging.getLogger("rsm.worker")

# The limits of a shutdown, step by step: aborted calls end, a report reaches Redis (which may hang), the engine stops.
_ABORT_S = 2.0
_REPORT_S = 1.5
_ENGINE_S = 5.0
# The limit of the whole shutdown, enforced by the exit timer if a step hangs.
_SHUTDOWN_S = 15.0
# The same while the engine is still loading: there are no calls to release.
_LOADING_S = 5.0
# How long a worker whose engine died waits for an unreachable Redis to report it.
_FLUSH_S = 10.0
# The length of an error in the engine's record, in characters.
_ERROR_SHOWN = 500
# Heartbeats between two comparisons with Redis's account of the calls.
_BEATS_PER_RECONCILIATION = 4


class Worker:
    """Runs one engine for one namespace. `serve` returns the exit status of the process.

    Args:
        model: the name that calls use. Default: what the engine reports.
        supervisor: the pid of the process that keeps this one running.
        birth: the supervisor's id for this process. Default: a new id.
        prefetch: calls claimed beyond the engine's slots, so that a slot never waits for a round trip.
        exit_timer: ends this process if it hangs. Default: nothing does.
    """

    def __init__(
        self,
        engine: str,
        backend: Backend,
        settings: Settings,
        *,
        model: str = "",
        node: str = "",
        supervisor: str = "",
        birth: str = "",
        prefetch: int = 2,
        exit_timer: HardExitTimer | None = None,
    ) -> None:
        self.engine = check_id(engine, "engine")
        self.settings = settings
        self._backend = backend
        self._model = model
        self._node = node or socket.gethostname()
        self._supervisor = supervisor
        self._prefetch = prefetch
        self._exit_timer = exit_timer or HardExitTimer(self.settings)
        self._keys = Keys(self.settings.namespace)
        self._transitions = Transitions(self._keys, self.settings)
        self._redis = connect(self.settings)
        self._publisher = Publisher(
            self.engine,
            self.settings,
            self._transitions,
            stale=lambda fences: self._in_loop(self._calls.drop, fences),
            gap=lambda fences: self._in_loop(self._calls.give_up, fences),
        )
        self._calls = Calls(
            backend,
            self._redis,
            self._keys,
            put=self._publisher.put,
            left=self._free_slot,
            died=self._engine_died,
            unit=create_unit(self.settings.service_unit),
        )
        self._reconciler = Reconciler(self.engine, self._redis, self._transitions, self._calls, self._publisher)
        self._facts = EngineFacts(model=model, max_num_seqs=0)
        self._slots = Slots(0)
        # The first incarnation has the id of the process. Each lost lease starts another one: `BIRTH.2` …
        self._birth, self._births = birth or new_id(), 0
        self._incarnation = ""
        self._lease: Lease | None = None
        self._claimer: Claimer | None = None
        self._control: Control | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_requested = asyncio.Event()
        self._serving = False
        # ("drain" | "stop" | "died" | "renew", detail): the reason of a death, or the incarnation that lost its lease
        self._commands: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def serve(self, handle_signals: bool = True) -> int:
        """Runs until it is stopped or its engine dies.

        Raises:
            EngineIdTaken: another live worker has this engine id.
            AccessDenied: Redis refuses this worker's user.
            EvictingRedis: Redis would delete calls when its memory is full.
        """
        self._loop = asyncio.get_running_loop()
        if handle_signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                # Not loop.add_signal_handler: the loop is blocked while an engine loads.
                signal.signal(number, lambda *_: self._on_signal())
        self._exit_timer.starting()
        try:
            await self._or_stopped(until_answered(lambda: require_noeviction(self._redis), denial_is_final=True))
            control_from = await self._register()
            self._facts = await self._start_engine()
            self._calls.cache = CacheMeter(self._facts.kv_tokens)
            self._publisher.start()
            await self._open_for_calls(control_from)
        except EngineDied as e:
            stopped = self._stop_requested.is_set()
            log.log(logging.INFO if stopped else logging.ERROR, "engine %s did not start: %s", self.engine, e)
            if self._lease is not None and not stopped:
                self._lease.announce({"error": shorten(str(e), _ERROR_SHOWN)})
            await self._shut_down(0)
            if stopped:
                return EXIT_OK
            return EXIT_INVALID if isinstance(e, EngineMisconfigured) else EXIT_ENGINE_DIED
        self._serving = True
        monitors = (self._watch_engine(), self._watch_progress(), self._reconcile_regularly())
        tasks = [asyncio.create_task(monitor) for monitor in monitors]
        try:
            return await self._run_commands()
        finally:
            for task in tasks:
                task.cancel()

    def request_stop(self) -> None:
        """Asks `serve` to drain and return; may be called from any thread."""
        self._in_loop(self._enqueue, "stop")

    def fail(self, reason: str) -> None:
        """Reports that a part of the worker has failed; `serve` releases all calls and returns. From any thread."""
        self._in_loop(self._engine_died, reason)

    def _on_signal(self) -> None:
        self._exit_timer.leaving(self.settings.drain_grace_s + _SHUTDOWN_S if self._serving else _LOADING_S)
        self._in_loop(self._enqueue, "stop")

    # -- commands, run one after the other

    def _enqueue(self, command: str, detail: str = "") -> None:
        if command == "stop":
            self._stop_requested.set()
        self._commands.put_nowait((command, detail))

    async def _run_commands(self) -> int:
        while True:
            command, detail = await self._commands.get()
            if command == "renew" and detail == self._incarnation:
                with contextlib.suppress(EngineDied):  # a stop was requested; its command comes next
                    await self._renew()
            elif command == "drain":
                await self._drain()
            elif command == "stop":
                await self._stop()
                return EXIT_OK
            elif command == "died":
                await self._handle_engine_death(detail)
                return EXIT_ENGINE_DIED

    async def _renew(self) -> None:
        """The lease was lost (this process hung, or Redis lost it): other workers own all of its calls by now."""
        self._calls.drop_all()
        await self._close_listeners()
        await self._calls.settle(_ABORT_S)
        await self._open_for_calls(await self._register())

    async def _drain(self) -> None:
        """Takes no new calls and lets running ones finish. The process stays until it is stopped."""
        try:
            async with asyncio.timeout(_REPORT_S):
                await self._beat(EngineState.DRAINING)  # first, so that the router sends no more calls
                if self._claimer is not None:
                    await in_thread(self._claimer.close)
                drain = self._transitions.drain(self.engine, incarnation=self._incarnation)
                while await self._run(drain) >= self.settings.batch:
                    pass
        except TimeoutError:
            log.warning(
                "engine %s drains, but Redis is unreachable; its waiting calls move when its lease expires", self.engine
            )
        log.info("engine %s drains: %d calls running", self.engine, len(self._calls))

    async def _stop(self) -> None:
        """Lets calls finish within the grace period, writes their results and releases the rest."""
        until = time.monotonic() + self.settings.drain_grace_s
        self._exit_timer.leaving(self.settings.drain_grace_s + _SHUTDOWN_S)
        await self._drain()
        self._calls.refuse("The engine was stopped.")
        await self._calls.settle(until - time.monotonic())
        self._calls.give_back()
        await self._calls.settle(_ABORT_S)
        self._calls.abandon("", "The engine was stopped.")
        await self._shut_down(max(_REPORT_S, until - time.monotonic()))
        log.info("engine %s has stopped", self.engine)

    async def _handle_engine_death(self, reason: str) -> None:
        if self._lease is not None:
            self._lease.announce({"error": shorten(reason, _ERROR_SHOWN)})
        log.error("engine %s died (%s); its calls go to other engines", self.engine, reason)
        self._exit_timer.leaving(_FLUSH_S + _SHUTDOWN_S)
        await self._drain()
        await self._calls.settle(_ABORT_S)
        self._calls.abandon("death", f"The engine died while the call was running: {reason}")
        await self._shut_down(_FLUSH_S)

    async def _shut_down(self, flush_s: float) -> None:
        """Writes queued output, frees the engine id and stops the engine."""
        if self._publisher.is_alive():
            await in_thread(partial(self._publisher.close, flush_s))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REPORT_S):
                await self._close_listeners()
                await self._beat(EngineState.STOPPED)
        try:
            async with asyncio.timeout(_ENGINE_S):
                await self._backend.stop(0)
        except TimeoutError:
            log.warning("engine %s did not stop within %g s; it ends with this process", self.engine, _ENGINE_S)
        self._redis.close()

    async def _watch_engine(self) -> None:
        self._engine_died(await self._backend.died())

    async def _watch_progress(self) -> None:
        """Watches the engine's progress. Its own rounds prove that the event loop runs."""
        watchdog = ProgressWatchdog(self.settings)
        while True:
            self._exit_timer.alive()
            await asyncio.sleep(check_interval_s(self.settings))
            if watchdog.check(self._backend.progress() if self._calls.engaged else None):
                self._engine_died(
                    f"it made no progress on its {self._calls.engaged} calls for {self.settings.stall_s:g} s"
                )
                return

    async def _reconcile_regularly(self) -> None:
        """Reconciles even if no outage was seen: a failover between two commands goes unnoticed."""
        while True:
            await asyncio.sleep(self.settings.heartbeat_ms * _BEATS_PER_RECONCILIATION / 1000)
            try:
                await self._reconciler.reconcile(self._incarnation, lambda: self._incarnation)
            except OUTAGES:
                log.debug("engine %s: Redis is unreachable; its calls are reconciled later", self.engine)

    def _engine_died(self, reason: str) -> None:
        self._calls.refuse("The engine died before the call began.")
        self._enqueue("died", reason)

    async def _start_engine(self) -> EngineFacts:
        """Starts the engine, unless a stop is requested first.

        Raises:
            EngineDied: it did not start, or a stop was requested.
        """
        starting = asyncio.create_task(self._backend.start())
        while not starting.done():
            command = asyncio.create_task(self._commands.get())
            await asyncio.wait([starting, command], return_when=asyncio.FIRST_COMPLETED)
            if command.done() and command.result()[0] == "stop":
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                raise EngineDied("stopped while it was starting")
            command.cancel()
        return starting.result()

    # -- registration and listeners

    async def _register(self) -> str:
        """Takes the engine id. Waits for the lease of a dead predecessor to expire, but not for that of a live one.

        Returns the entry of the control stream after which commands are for this worker.
        """
        self._births += 1
        survived, seen = self._incarnation, 0
        self._incarnation = self._birth if self._births == 1 else f"{self._birth}.{self._births}"
        while True:
            command = self._transitions.register(self.engine, self._incarnation, self._registration(), survived)
            reply = await self._or_stopped(self._run(command))
            if reply.ok:
                self._lease = self._new_lease()
                return reply.control_from
            if seen and reply.heartbeat_ms > seen:
                raise EngineIdTaken(
                    f"Engine id {self.engine} is taken by a live worker (pid {reply.pid} on {reply.node}). "
                    "Stop that worker, or start this one under another id."
                )
            seen = reply.heartbeat_ms
            await asyncio.sleep(self.settings.heartbeat_ms * 1.5 / 1000)

    def _registration(self) -> dict[str, Arg]:
        return {
            "node": self._node,
            "pid": os.getpid(),
            "supervisor": self._supervisor,
            "model": self._model or self._facts.model,
            "max_num_seqs": self._facts.max_num_seqs,
            "kv_tokens": self._facts.kv_tokens,
            "version": self._facts.version,
            "service_unit": self.settings.service_unit,
        }

    def _new_lease(self) -> Lease:
        incarnation = self._incarnation
        lost = partial(self._in_loop, self._enqueue, "renew", incarnation)
        lease = Lease(self.engine, incarnation, self.settings, self._transitions, self._load, lost)
        lease.start()
        return lease

    def _load(self) -> Mapping[str, Arg]:
        load, calls, cache = self._backend.load(), self._calls.meter, self._calls.cache
        speed = load.speed or (calls.meter.speed if calls.meter.measured else None)
        return {
            "running": len(self._calls),
            "kv_usage": f"{load.kv_usage:.4f}",
            "tokens_per_s": f"{load.tokens_per_s:.1f}",
            "completion_tokens": f"{calls.completion_tokens:.1f}",
            "cache_age_s": f"{cache.age_s(time.perf_counter()):.1f}",
            "reuse_found": f"{cache.reuse_found:.3f}",
            # Until it is measured, the value from an earlier process of this engine stays.
            **({"speed": str(speed)} if speed else {}),
        }

    async def _open_for_calls(self, control_from: str) -> None:
        # Listen for cancels before the first claim, so that no cancel in between is lost.
        self._control = Control(
            self.engine,
            control_from,
            self.settings,
            lambda fence: self._in_loop(self._calls.cancel, fence),
            lambda command: self._in_loop(self._enqueue, command),
        )
        self._control.start()
        if self._lease is not None:
            self._lease.announce(self._registration() | {"error": ""})
        if not await self._beat(EngineState.READY):
            self._enqueue("renew", self._incarnation)
            return
        self._slots = Slots(self._facts.max_num_seqs + self._prefetch)
        self._claimer = Claimer(
            self.engine,
            self._incarnation,
            self.settings,
            self._transitions,
            self._slots,
            partial(self._in_loop, self._take, self._incarnation),
            self._backend.preemption_threshold,
        )
        self._claimer.start()
        log.info("engine %s is ready: %s, %d slots", self.engine, self._facts.model, self._facts.max_num_seqs)

    def _free_slot(self) -> None:
        """A call has left the engine."""
        if self._slots.release():
            self._publisher.put(Wake())

    def _take(self, incarnation: str, claimed: list[Claimed] | None) -> None:
        if claimed is None:
            self._enqueue("renew", incarnation)
        else:
            self._calls.start(claimed)

    async def _close_listeners(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._claimer is not None:
            await in_thread(self._claimer.close)
        if self._lease is not None:
            await in_thread(self._lease.close)

    # -- Redis

    async def _beat(self, state: EngineState) -> bool:
        """Reports a state at once; False if the lease is lost or Redis is unreachable."""
        if self._lease is None:
            return False
        try:
            return await in_thread(partial(self._lease.beat, state))
        except OUTAGES:
            log.warning("engine %s could not report %s: Redis is unreachable", self.engine, state)
            return state is EngineState.READY  # the lease thread will report it

    async def _run(self, command: Command[T]) -> T:
        return await until_answered(lambda: execute.run(self._redis, command), denial_is_final=self._lease is None)

    async def _or_stopped(self, asking: Coroutine[Any, Any, T]) -> T:
        """Waits for Redis's answer, however long that takes, or for a stop.

        Raises:
            EngineDied: a stop was requested first.
            AccessDenied: Redis refuses this worker's user, and it has not started yet.
        """
        answer, stop = asyncio.create_task(asking), asyncio.create_task(self._stop_requested.wait())
        await asyncio.wait([answer, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if answer.done():
            return answer.result()
        answer.cancel()
        raise EngineDied("stopped while Redis was unreachable")

    def _in_loop(self, action: Callable[..., None], *args: object) -> None:
        """Runs something in the event loop, from another thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action, *args)
