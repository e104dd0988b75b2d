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
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from broker import codec, scripts
from broker.codec import text
from broker.connection import BLIPS, connect, persist
from broker.errors import EngineIdTaken, InvalidRequest
from broker.ids import check_id, new_id
from broker.keys import Keys
from broker.models import EngineState, ErrorCode, RequestState
from broker.scripts import Arg
from broker.settings import Settings
from broker.transitions import Claimed, Fence, Finish, Release, Transitions
from workers.backend import Backend, CallRejected, EngineDied, EngineError, EngineFacts, Job, Outcome, Piece, Resumed
from workers.claimer import Claimer, Room
from workers.control import Control
from workers.lease import Lease
from workers.publisher import Output, Publisher

log = logging.getLogger("rsm.worker")

EXIT_OK = 0
EXIT_ENGINE_DIED = 70
EXIT_ID_TAKEN = 75


@dataclass(slots=True)
class Running:
    """A call in the engine. `numbers`: the next event number, shared with the publisher."""

    claimed: Claimed
    numbers: list[int]
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    dropped: bool = False  # no longer ours: publish nothing more
    key: str = field(init=False)

    def __post_init__(self) -> None:
        self.key = key_of(self.claimed.fence)


def key_of(fence: Fence) -> str:
    """A name for one attempt that is unique in the engine."""
    return f"{fence.call_id}/{fence}"


class Worker:
    """Runs one engine for one namespace. `serve` returns the exit status of the process.

    Args:
        prefetch: calls claimed beyond the engine's slots, so that a slot never waits for a round trip.
    """

    def __init__(
        self, engine: str, backend: Backend, settings: Settings | None = None, *, node: str = "", prefetch: int = 2
    ) -> None:
        self.engine = check_id(engine, "engine")
        self.settings = settings or Settings()
        self._backend = backend
        self._node = node or socket.gethostname()
        self._prefetch = prefetch
        self._keys = Keys(self.settings.namespace)
        self._transitions = Transitions(self._keys, self.settings)
        self._redis = connect(self.settings)
        self._running: dict[str, Running] = {}
        self._incarnation = ""
        self._facts = EngineFacts(model="", max_num_seqs=0)
        self._wanted = asyncio.Event()  # somebody wants `serve` to do something
        self._wish = ""  # "", "drain", "stop", "renew" (lease lost) or "died"
        self._reason = ""

    # -- life

    async def serve(self, handle_signals: bool = True) -> int:
        """Runs until it is told to stop or its engine dies.

        Raises:
            EngineIdTaken: another live worker has this engine id.
        """
        self._loop = asyncio.get_running_loop()
        if handle_signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._want, "stop")
        control_from = await self._register()
        self._lease = self._new_lease()
        try:
            self._facts = await self._backend.start()
        except EngineDied as e:
            log.error("engine %s did not start: %s", self.engine, e)
            await self._leave()
            return EXIT_ENGINE_DIED
        self._publisher = Publisher(
            self.engine, self.settings, self._transitions, lambda fences: self._call(self._drop_all, fences)
        )
        self._publisher.start()
        await self._announce()
        await self._open_for_work(control_from)
        died = asyncio.create_task(self._watch_engine())
        try:
            return await self._obey_wishes()
        finally:
            died.cancel()

    def request_stop(self) -> None:
        """Asks `serve` to drain and return; may be called from any thread."""
        self._call(self._want, "stop")

    async def _obey_wishes(self) -> int:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            if self._wish == "renew":
                await self._renew()
            elif self._wish == "drain":
                await self._drain()
            elif self._wish == "stop":
                await self._stop()
                return EXIT_OK
            elif self._wish == "died":
                await self._bury_engine()
                return EXIT_ENGINE_DIED

    def _want(self, wish: str, reason: str = "") -> None:
        # A death or a stop is final; nothing less may replace it.
        if self._wish not in ("died", "stop") or wish == "died":
            self._wish, self._reason = wish, reason
        self._wanted.set()

    def _call(self, action: object, *args: object) -> None:
        """Runs something in the event loop, from another thread."""
        try:
            self._loop.call_soon_threadsafe(action, *args)  # type: ignore[arg-type]
        except RuntimeError:  # the loop is closed: the process is on its way out
            log.debug("too late for %r", action)

    # -- registration

    async def _register(self) -> str:
        """Takes the engine id. A dead predecessor's lease is waited out; a live one's is not.

        Returns the entry of the control stream behind which orders are for us.
        """
        self._incarnation = new_id()
        seen = 0
        while True:
            reply = await asyncio.to_thread(
                self._persist, self._transitions.register(self.engine, self._incarnation, self._registration())
            )
            if reply.ok:
                return reply.control_from
            if seen and reply.heartbeat_ms > seen:
                raise EngineIdTaken(
                    f"Engine id {self.engine} is taken by a live worker (pid {reply.pid} on {reply.node}). "
                    "Stop that one, or start this one under another id."
                )
            seen = reply.heartbeat_ms
            await asyncio.sleep(self.settings.heartbeat_ms * 1.5 / 1000)

    def _registration(self) -> dict[str, Arg]:
        f = self._facts
        return {
            "node": self._node,
            "pid": os.getpid(),
            "model": f.model,
            "max_num_seqs": f.max_num_seqs,
            "kv_tokens": f.kv_tokens,
            "version": f.version,
        }

    async def _announce(self) -> None:
        """Writes down what the engine turned out to be."""
        key, fields = self._keys.engine(self.engine), self._registration()
        await asyncio.to_thread(self._ask, lambda: self._redis.hset(key, mapping=dict(fields)))

    def _new_lease(self) -> Lease:
        lease = Lease(
            self.engine,
            self._incarnation,
            self.settings,
            self._transitions,
            self._load,
            lambda: self._call(self._want, "renew"),
        )
        lease.start()
        return lease

    def _load(self) -> Mapping[str, Arg]:
        load = self._backend.load()
        return {
            "running": len(self._running),
            "kv_usage": f"{load.kv_usage:.4f}",
            "tokens_per_s": f"{load.tokens_per_s:.1f}",
        }

    async def _open_for_work(self, control_from: str) -> None:
        # The ear for cancels is open before the first claim: a cancel sent in between would be lost otherwise.
        self._control = Control(
            self.engine,
            control_from,
            self.settings,
            lambda fence: self._call(self._cancel, fence),
            lambda op: self._call(self._want, op),
        )
        self._control.start()
        if not await asyncio.to_thread(self._lease.beat, EngineState.READY):
            return
        self._room = Room(self._facts.max_num_seqs + self._prefetch)
        self._claimer = Claimer(
            self.engine,
            self._incarnation,
            self.settings,
            self._transitions,
            self._room,
            lambda claimed: self._call(self._start_all, claimed),
        )
        self._claimer.start()
        log.info("engine %s is ready: %s, %d slots", self.engine, self._facts.model, self._facts.max_num_seqs)

    # -- calls

    def _start_all(self, claimed: list[Claimed] | None) -> None:
        if claimed is None:
            self._want("renew")
            return
        for call in claimed:
            running = Running(call, [call.events], cancelled=call.cancelled)
            self._running[running.key] = running
            running.task = self._loop.create_task(self._run(running))

    async def _run(self, running: Running) -> None:
        c = running.claimed
        try:
            job = await self._job(c, running.key)
            if running.cancelled:  # flagged before it could begin
                self._finish(running, Outcome("abort"))
                return
            outcome = await self._backend.run(job, lambda piece: self._emit(running, piece))
            if running.cancelled or outcome.finish_reason != "abort":
                self._finish(running, outcome)
            else:
                self._release(running, fault=False, error="The engine was stopped while the call was running.")
        except (CallRejected, InvalidRequest) as e:
            self._fail(running, str(e))
        except EngineDied as e:
            self._release(running, fault=True, error=f"The engine died while the call was running: {e}", died=True)
        except EngineError as e:
            self._release(running, fault=True, error=f"The engine failed: {e}")
        except Exception as e:
            # The type and the place, never the message: it may quote the prompt.
            log.error("call %s: %s in the backend", c.fence.call_id, type(e).__name__, exc_info=log.isEnabledFor(10))
            self._release(running, fault=True, error=f"The engine failed: {type(e).__name__}.")
        finally:
            self._running.pop(running.key, None)
            self._room.give()

    async def _job(self, c: Claimed, key: str) -> Job:
        return Job(
            key=key,
            call_id=c.fence.call_id,
            session=c.session,
            kind=c.kind,
            body=codec.decode(c.body, c.body_field),
            stream=c.stream,
            priority=c.priority,
            level=c.level,
            traceparent=c.traceparent,
            resumed=await self._resumed(c) if c.events else None,
        )

    async def _resumed(self, c: Claimed) -> Resumed:
        """What the reader has already: from the durable log of the call."""
        key = self._keys.events(c.fence.call_id)
        entries: Any = await asyncio.to_thread(self._ask, lambda: self._redis.xrange(key))
        fields = [f for _, f in entries]
        lines = [text(f.get(name)) for name in (b"replay", b"chunk") for f in fields]
        replays, chunks = lines[: len(fields)], lines[len(fields) :]
        return Resumed(
            text="".join(text(f.get(b"text")) for f in fields),
            token_ids=[int(i) for f in fields for i in text(f.get(b"token_ids")).split()],
            replays=[line for r in replays if r for line in r.split("\n")],
            chunks=sum(len(chunk.split("\n")) for chunk in chunks if chunk),
        )

    def _emit(self, running: Running, piece: Piece) -> None:
        if running.claimed.stream and not running.dropped:
            self._publisher.put(Output(running.claimed.fence, running.numbers, piece))

    def _finish(self, running: Running, o: Outcome) -> None:
        if running.dropped:
            return
        c = running.claimed
        state = RequestState.CANCELLED if running.cancelled else RequestState.COMPLETED
        result: dict[str, Any] = {
            "text": o.text,
            "token_ids": o.token_ids,
            "finish_reason": o.finish_reason,
            "ttft_ms": o.ttft_ms,
        }
        if o.response is not None:
            result["response"] = o.response
        self._publisher.put(
            Finish(
                c.fence,
                state,
                "",
                "",
                codec.encode(result, c.body_field),
                o.prompt_tokens,
                o.completion_tokens,
                o.cached_tokens,
                o.prompt_tokens + o.completion_tokens,
            )
        )

    def _fail(self, running: Running, message: str) -> None:
        if not running.dropped:
            fence = running.claimed.fence
            self._publisher.put(
                Finish(fence, RequestState.FAILED, ErrorCode.INVALID_REQUEST.value, message, b"", 0, 0, 0, 0)
            )

    def _release(self, running: Running, fault: bool, error: str, died: bool = False) -> None:
        if not running.dropped:
            code = ErrorCode.ATTEMPTS_EXHAUSTED if died else ErrorCode.ENGINE_ERROR
            self._publisher.put(Release(running.claimed.fence, fault, code.value, error))

    def _cancel(self, fence: Fence) -> None:
        running = self._running.get(key_of(fence))
        if running is not None:
            running.cancelled = True
            self._backend.abort(running.key)

    def _drop_all(self, fences: list[Fence]) -> None:
        """Calls that are somebody else's by now: stop them and say nothing more of them."""
        for fence in fences:
            running = self._running.get(key_of(fence))
            if running is not None:
                running.dropped = True
                self._backend.abort(running.key)

    # -- wishes

    async def _renew(self) -> None:
        """The lease was lost (this process was stopped, or Redis said so): everything it ran is others' now."""
        await asyncio.to_thread(self._claimer.close)
        self._control.close()
        self._drop_all([r.claimed.fence for r in self._running.values()])
        await self._settle(self.settings.lease_ms / 1000)
        await asyncio.to_thread(self._lease.close)
        control_from = await self._register()
        self._lease = self._new_lease()
        await self._open_for_work(control_from)

    async def _drain(self) -> None:
        """Out of service: no new calls, running ones finish. The process stays until it is told to stop."""
        await asyncio.to_thread(self._claimer.close)
        await asyncio.to_thread(self._lease.beat, EngineState.DRAINING)
        await asyncio.to_thread(self._give_back_queue)
        log.info("engine %s drains: %d calls running", self.engine, len(self._running))

    async def _stop(self) -> None:
        await self._drain()
        await self._settle(self.settings.drain_grace_s)
        for running in list(self._running.values()):
            self._backend.abort(running.key)
        await self._settle(5.0)
        await self._leave()
        log.info("engine %s has stopped", self.engine)

    async def _bury_engine(self) -> None:
        log.error("engine %s died (%s); its calls go to others", self.engine, self._reason)
        await self._drain()
        await self._settle(5.0)
        await self._leave()

    async def _leave(self) -> None:
        """Writes what is left to write, and gives the id free."""
        if hasattr(self, "_publisher"):
            await asyncio.to_thread(self._publisher.close, 10.0)
            self._control.close()
        await asyncio.to_thread(self._lease.close)
        try:
            await asyncio.to_thread(self._lease.beat, EngineState.STOPPED)
        except BLIPS:
            log.warning("engine %s leaves while Redis is away; its lease will run out", self.engine)
        await self._backend.stop(5.0)
        self._redis.close()

    async def _settle(self, timeout_s: float) -> None:
        """Waits until no call is running, at most so many seconds."""
        until = time.monotonic() + timeout_s
        while self._running and time.monotonic() < until:
            tasks = [r.task for r in self._running.values() if r.task is not None]
            await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()), return_when=asyncio.ALL_COMPLETED)

    def _give_back_queue(self) -> None:
        while (self._persist(self._transitions.drain(self.engine)) or 0) >= self.settings.batch:
            pass

    async def _watch_engine(self) -> None:
        reason = await self._backend.died()
        self._want("died", reason)

    def _persist(self, command: scripts.Command[scripts.T]) -> scripts.T:
        return self._ask(lambda: scripts.run(self._redis, command))

    def _ask(self, action: Callable[[], scripts.T]) -> scripts.T:
        """Asks Redis until it answers."""
        done: list[scripts.T] = []
        persist(lambda: done.append(action()), "worker", lambda: False)
        return done[0]
