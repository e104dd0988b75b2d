"""The worker: one process, one engine.

1. Takes its engine id (or refuses to start, if another live worker has it) and holds the lease.
2. Brings the engine up, then claims what it can start, runs it and publishes pieces and results.
3. Obeys cancel flags, drain and stop.
4. Leaves no call behind: on stop it lets them finish within the grace and gives the rest back; when its engine dies
   it gives all of them back and exits, to be started anew by its supervisor.

It is worse to lose a call than to run it twice: a call leaves Redis's running set only with a result, or for a queue.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from broker import scripts
from broker.connection import BLIPS, connect, persist
from broker.errors import EngineIdTaken
from broker.ids import check_id, new_id
from broker.keys import Keys
from broker.models import EngineState
from broker.scripts import Arg
from broker.settings import Settings
from broker.transitions import Claimed, Transitions
from workers.backend import Backend, EngineDied, EngineFacts
from workers.calls import Calls
from workers.claimer import Claimer, Room
from workers.control import Control
from workers.environment import EXIT_ENGINE_DIED, EXIT_OK, SUPERVISOR_VARIABLE
from workers.lease import Lease
from workers.publisher import Publisher
from workers.reconcile import Reconciler

log = logging.getLogger("rsm.worker")

_ABORT_S = 5.0
_FLUSH_S = 10.0
# Heartbeats between two looks at Redis's account of the calls.
_BEATS_PER_LOOK = 4


class Worker:
    """Runs one engine for one namespace. `serve` returns the exit status of the process.

    Args:
        model: the name calls ask for; none = what the engine says of itself.
        prefetch: calls claimed beyond the engine's slots, so that a slot never waits for a round trip.
    """

    def __init__(
        self,
        engine: str,
        backend: Backend,
        settings: Settings | None = None,
        *,
        model: str = "",
        node: str = "",
        prefetch: int = 2,
    ) -> None:
        self.engine = check_id(engine, "engine")
        self.settings = settings or Settings()
        self._backend = backend
        self._model = model
        self._node = node or socket.gethostname()
        self._prefetch = prefetch
        self._keys = Keys(self.settings.namespace)
        self._transitions = Transitions(self._keys, self.settings)
        self._redis = connect(self.settings)
        self._publisher = Publisher(
            self.engine,
            self.settings,
            self._transitions,
            stale=lambda fences: self._call(self._calls.drop, fences),
            gap=lambda fences: self._call(self._calls.give_up, fences),
        )
        self._calls = Calls(
            backend,
            self._redis,
            self._keys,
            put=self._publisher.put,
            left=lambda: self._room.give(),
            died=self._engine_died,
        )
        self._reconciler = Reconciler(self.engine, self._redis, self._transitions, self._calls, self._publisher)
        self._facts = EngineFacts(model=model, max_num_seqs=0)
        self._room = Room(0)
        self._incarnation = ""
        self._lease: Lease | None = None
        self._claimer: Claimer | None = None
        self._control: Control | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # ("drain" | "stop" | "died" | "renew", detail): the reason of a death, the incarnation whose lease was lost
        self._told_to_stop = threading.Event()
        self._wishes: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def serve(self, handle_signals: bool = True) -> int:
        """Runs until it is told to stop or its engine dies.

        Raises:
            EngineIdTaken: another live worker has this engine id.
            AccessDenied: Redis refuses this worker's user.
        """
        self._loop = asyncio.get_running_loop()
        if handle_signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._want, "stop")
        try:
            control_from = await self._register()
            self._facts = await self._start_engine()
        except EngineDied as e:
            stopped = self._told_to_stop.is_set()
            log.log(logging.INFO if stopped else logging.ERROR, "engine %s did not start: %s", self.engine, e)
            await self._leave()
            return EXIT_OK if stopped else EXIT_ENGINE_DIED
        self._publisher.start()
        await self._announce()
        await self._open_for_work(control_from)
        watches = [asyncio.create_task(self._watch_engine()), asyncio.create_task(self._keep_accounts())]
        try:
            return await self._grant_wishes()
        finally:
            for watch in watches:
                watch.cancel()

    def request_stop(self) -> None:
        """Asks `serve` to drain and return; may be called from any thread."""
        self._call(self._want, "stop")

    def fail(self, reason: str) -> None:
        """Says that a part of the worker is gone, from any thread: `serve` gives all calls back and returns."""
        self._call(self._engine_died, reason)

    # -- wishes: whatever is to happen happens here, one thing after the other

    def _want(self, wish: str, detail: str = "") -> None:
        if wish == "stop":
            self._told_to_stop.set()
        self._wishes.put_nowait((wish, detail))

    async def _grant_wishes(self) -> int:
        while True:
            wish, detail = await self._wishes.get()
            if wish == "renew" and detail == self._incarnation:
                await self._renew()
            elif wish == "drain":
                await self._drain()
            elif wish == "stop":
                await self._stop()
                return EXIT_OK
            elif wish == "died":
                await self._bury_engine(detail)
                return EXIT_ENGINE_DIED

    async def _renew(self) -> None:
        """The lease was lost (this process stood still, or Redis says so): everything it ran is others' now."""
        self._calls.drop_all()
        await self._close_ears()
        await self._calls.settle(_ABORT_S)
        control_from = await self._register()
        await self._announce()
        await self._open_for_work(control_from)

    async def _drain(self) -> None:
        """Out of service: no new calls, running ones finish. The process stays until it is told to stop."""
        await self._beat(EngineState.DRAINING)  # first of all: from here on the router sends nothing
        if self._claimer is not None:
            await asyncio.to_thread(self._claimer.close)
        try:
            drain = self._transitions.drain(self.engine, incarnation=self._incarnation)
            while await self._run(drain, _FLUSH_S) >= self.settings.batch:
                pass
        except BLIPS:
            log.warning("engine %s drains while Redis is away; its lease will give its calls to others", self.engine)
        log.info("engine %s drains: %d calls running", self.engine, len(self._calls))

    async def _stop(self) -> None:
        await self._drain()
        await self._calls.settle(self.settings.drain_grace_s)
        self._calls.give_back()
        await self._calls.settle(_ABORT_S)
        await self._leave()
        log.info("engine %s has stopped", self.engine)

    async def _bury_engine(self, reason: str) -> None:
        log.error("engine %s died (%s); its calls go to others", self.engine, reason)
        await self._drain()
        await self._calls.settle(_ABORT_S)
        await self._leave()

    async def _leave(self) -> None:
        """Writes what is left to write, gives the id free, and takes the engine down."""
        if self._publisher.is_alive():
            await asyncio.to_thread(self._publisher.close, _FLUSH_S)
        await self._close_ears()
        await self._beat(EngineState.STOPPED)
        await self._backend.stop(_ABORT_S)
        self._redis.close()

    async def _watch_engine(self) -> None:
        self._engine_died(await self._backend.died())

    async def _keep_accounts(self) -> None:
        """Also without a blip that was seen: a fail-over between two commands shows nowhere."""
        while True:
            await asyncio.sleep(self.settings.heartbeat_ms * _BEATS_PER_LOOK / 1000)
            try:
                await self._reconciler.look(self._incarnation, lambda: self._incarnation)
            except BLIPS:
                log.debug("engine %s: Redis is away; its account of the calls is looked at later", self.engine)

    def _engine_died(self, reason: str) -> None:
        self._calls.refuse()
        self._want("died", reason)

    async def _start_engine(self) -> EngineFacts:
        """Brings the engine up, unless a signal comes first.

        Raises:
            EngineDied: it did not come up, or was not to.
        """
        starting = asyncio.create_task(self._backend.start())
        while not starting.done():
            wish = asyncio.create_task(self._wishes.get())
            await asyncio.wait([starting, wish], return_when=asyncio.FIRST_COMPLETED)
            if wish.done() and wish.result()[0] == "stop":
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                raise EngineDied("told to stop while it was starting")
            wish.cancel()
        return starting.result()

    # -- registration and ears

    async def _register(self) -> str:
        """Takes the engine id. A dead predecessor's lease is waited out; a live one's is not.

        Returns the entry of the control stream behind which orders are for us.
        """
        self._incarnation, seen = new_id(), 0
        while True:
            reply = await self._run(self._transitions.register(self.engine, self._incarnation, self._registration()))
            if reply.ok:
                self._lease = self._new_lease()
                return reply.control_from
            if seen and reply.heartbeat_ms > seen:
                raise EngineIdTaken(
                    f"Engine id {self.engine} is taken by a live worker (pid {reply.pid} on {reply.node}). "
                    "Stop that one, or start this one under another id."
                )
            seen = reply.heartbeat_ms
            await asyncio.sleep(self.settings.heartbeat_ms * 1.5 / 1000)

    def _registration(self) -> dict[str, Arg]:
        return {
            "node": self._node,
            "pid": os.getpid(),
            "supervisor": os.environ.get(SUPERVISOR_VARIABLE, ""),
            "model": self._model or self._facts.model,
            "max_num_seqs": self._facts.max_num_seqs,
            "kv_tokens": self._facts.kv_tokens,
            "version": self._facts.version,
        }

    async def _announce(self) -> None:
        """Writes down what the engine turned out to be."""
        key = self._keys.engine(self.engine)
        fields: Any = self._registration()
        await self._ask(lambda: self._redis.hset(key, mapping=fields))

    def _new_lease(self) -> Lease:
        incarnation = self._incarnation
        lost = partial(self._call, self._want, "renew", incarnation)
        lease = Lease(self.engine, incarnation, self.settings, self._transitions, self._load, lost)
        lease.start()
        return lease

    def _load(self) -> Mapping[str, Arg]:
        load = self._backend.load()
        return {
            "running": len(self._calls),
            "kv_usage": f"{load.kv_usage:.4f}",
            "tokens_per_s": f"{load.tokens_per_s:.1f}",
        }

    async def _open_for_work(self, control_from: str) -> None:
        # The ear for cancels is open before the first claim: a cancel sent in between would be lost otherwise.
        self._control = Control(
            self.engine,
            control_from,
            self.settings,
            lambda fence: self._call(self._calls.cancel, fence),
            lambda op: self._call(self._want, op),
        )
        self._control.start()
        if not await self._beat(EngineState.READY):
            self._want("renew", self._incarnation)
            return
        self._room = Room(self._facts.max_num_seqs + self._prefetch)
        self._claimer = Claimer(
            self.engine,
            self._incarnation,
            self.settings,
            self._transitions,
            self._room,
            partial(self._call, self._take, self._incarnation),
        )
        self._claimer.start()
        log.info("engine %s is ready: %s, %d slots", self.engine, self._facts.model, self._facts.max_num_seqs)

    def _take(self, incarnation: str, claimed: list[Claimed] | None) -> None:
        if claimed is None:
            self._want("renew", incarnation)
        else:
            self._calls.start(claimed)

    async def _close_ears(self) -> None:
        if self._claimer is not None:
            await asyncio.to_thread(self._claimer.close)
        if self._control is not None:
            self._control.close()
        if self._lease is not None:
            await asyncio.to_thread(self._lease.close)

    # -- Redis

    async def _beat(self, state: EngineState) -> bool:
        """Reports a state at once; False if the lease is not ours any more, or Redis is away."""
        if self._lease is None:
            return False
        try:
            return await asyncio.to_thread(self._lease.beat, state)
        except BLIPS:
            log.warning("engine %s could not report %s: Redis is away", self.engine, state)
            return state is EngineState.READY  # the lease thread will report it

    async def _run(self, command: scripts.Command[scripts.T], timeout_s: float | None = None) -> scripts.T:
        return await self._ask(lambda: scripts.run(self._redis, command), timeout_s)

    async def _ask(self, action: Callable[[], scripts.T], timeout_s: float | None = None) -> scripts.T:
        """Asks Redis until it answers, off the event loop.

        Raises:
            redis.ConnectionError or its kin: it did not within `timeout_s`.
            EngineDied: no time limit was given, and the worker was told to stop.
            AccessDenied: it has not begun its work yet, and Redis refuses its user.
        """
        done: list[scripts.T] = []
        given_up = self._told_to_stop.is_set if timeout_s is None else lambda: False
        asking = partial(persist, denial_is_final=self._lease is None)
        await asyncio.to_thread(asking, lambda: done.append(action()), "worker", given_up, timeout_s)
        if not done:
            raise EngineDied("told to stop while Redis was away")
        return done[0]

    def _call(self, action: Callable[..., None], *args: object) -> None:
        """Runs something in the event loop, from another thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action, *args)
