"""A worker without an engine: the test decides what happens to each call. It uses `Transitions` only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rsm.broker import RequestState, Settings
from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import OUTAGES
from rsm.broker.protocol import codec
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.scripts import Arg
from rsm.broker.protocol.transitions import Claimed, Event, Fault, Fence, Finish, Registered, Release, Transitions
from rsm.router.policies import Policy
from rsm.router.router import Router
from rsm.workers.scheduling.service import Tokens, Used, charge
from tests.support.waiting import eventually

Answer = Callable[["FakeWorker", Claimed], None]

_WAKE_S = 0.05


class FakeWorker:
    """One incarnation of an engine, driven by hand; `serving` drives it from a thread.

    Args:
        server: a Redis client, real or fake. Default: a connection of its own.
        load: fields of the registration, such as `max_num_seqs`.
    """

    def __init__(
        self,
        settings: Settings,
        engine: str = "e1",
        model: str = "m",
        *,
        server: Any = None,
        incarnation: str | None = None,
        **load: Arg,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.incarnation = incarnation or new_id()
        self.keys = Keys(settings.namespace)
        self.transitions = Transitions(self.keys, settings)
        self.held: dict[str, Claimed] = {}
        self.claims = 0
        self._fields: dict[str, Arg] = {"model": model, "node": "here", "pid": 1, "max_num_seqs": 8, **load}
        self._control = "0-0"
        self._owned = server is None
        self.db: Any = connect(settings, block_s=_WAKE_S) if server is None else server

    # -- steps

    def register(self, survived: str = "") -> Registered:
        command = self.transitions.register(self.engine, self.incarnation, self._fields, survived)
        reply = execute.run(self.db, command)
        self._control = reply.control_from
        return reply

    def beat(self, state: str = "READY", **load: Arg) -> bool:
        return execute.run(self.db, self.transitions.heartbeat(self.engine, self.incarnation, state, load))

    def up(self) -> FakeWorker:
        """Registers and becomes READY."""
        assert self.register().ok
        assert self.beat()
        return self

    def claim(
        self, most: int = 10, claim_no: int | None = None, ahead: int = 0, threshold: tuple[int, int] = (0, 0)
    ) -> list[Claimed] | None:
        """Claims at most this many calls. After a lost reply, the same `claim_no` returns the same calls."""
        claim_no = self.claims + 1 if claim_no is None else claim_no
        command = self.transitions.claim(self.engine, self.incarnation, claim_no, most, ahead, threshold)
        claimed = execute.run(self.db, command)
        self.claims = claim_no
        self.held |= {c.fence.call_id: c for c in claimed or ()}
        return claimed

    def take(self) -> Claimed:
        """Claims one call, which must be waiting."""
        claimed = self.claim(1)
        assert claimed
        return claimed[0]

    def take_soon(self) -> Claimed:
        """Waits for the next call and claims it."""
        eventually(lambda: self.db.zcard(self.keys.queue(self.engine)), what=f"a call for {self.engine}")
        return self.take()

    def publish(self, call: Claimed, *texts: str, first: int | None = None) -> list[str]:
        """Publishes one chunk per text, numbered from `first`. Default: after those of earlier attempts."""
        first = call.events if first is None else first
        events = [Event(call.fence, first + i, t, [first + i], "", "") for i, t in enumerate(texts)]
        return execute.run(self.db, self.transitions.publish(self.engine, events))

    def finish(
        self, call: Claimed, text: str = "done", state: RequestState = RequestState.COMPLETED, **how: Any
    ) -> str:
        """Ends a call, as `end_of` describes. Returns the script's reply code."""
        self.held.pop(call.fence.call_id, None)
        return execute.run(self.db, self.transitions.finish(self.engine, [self.end_of(call, text, state, **how)]))[0]

    def end_of(
        self,
        call: Claimed,
        text: str = "done",
        state: RequestState = RequestState.COMPLETED,
        *,
        error_code: str = "",
        error: str = "",
        prompt_tokens: int = 10,
        completion_tokens: int = 5,
        cached_tokens: int = 0,
        resident_tokens: int = 0,
        fence: Fence | None = None,
        events: int | None = None,
        service: int | None = None,
    ) -> Finish:
        """The message that ends a call. `service`: by default, charged in tokens."""
        result = {"text": text, "token_ids": [1, 2], "finish_reason": "stop", "ttft_ms": 1}
        return Finish(
            fence or call.fence,
            state,
            error_code,
            error,
            codec.encode(result, call.body_field),
            prompt_tokens,
            completion_tokens,
            cached_tokens,
            resident_tokens,
            events,
            charge(Tokens(), Used(prompt_tokens, completion_tokens, cached_tokens)) if service is None else service,
        )

    def fail(self, call: Claimed, error_code: str = "engine_error", error: str = "The engine broke.") -> str:
        return self.finish(call, "", RequestState.FAILED, error_code=error_code, error=error)

    def release(
        self, *calls: Claimed, fault: bool = False, death: bool = False, error: str = "The engine broke."
    ) -> list[str]:
        kind: Fault = "death" if death else "error" if fault else ""
        releases = [Release(c.fence, kind, "engine_error", error) for c in calls]
        for c in calls:
            self.held.pop(c.fence.call_id, None)
        return execute.run(self.db, self.transitions.release(self.engine, releases))

    def orders(self) -> list[dict[str, str]]:
        """The entries of the control stream since the registration or the last call of this."""
        entries: Sequence[Any] = self.db.xrange(self.keys.control(self.engine), min=f"({self._control}")
        if entries:
            self._control = codec.text(entries[-1][0])
        return [{codec.text(k): codec.text(v) for k, v in fields.items()} for _, fields in entries]

    # -- driven by a thread

    @contextmanager
    def serving(self, answer: Answer) -> Iterator[FakeWorker]:
        """Claims and answers from a thread, renews the lease, and ends flagged calls, until the block is left.

        A call that `answer` does not finish keeps running.
        """
        assert self._owned, "a thread needs a connection of its own"
        stop = threading.Event()
        self.up()
        thread = threading.Thread(target=self._serve, args=(answer, stop), name=f"fake-{self.engine}")
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()
            self.close()

    def close(self) -> None:
        if self._owned:
            self.db.close()

    def _serve(self, answer: Answer, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self._turn(answer)
            except OUTAGES:
                stop.wait(0.05)

    def _turn(self, answer: Answer) -> None:
        if not self.beat():
            self.held.clear()
            self.incarnation = new_id()
            self.up()
        claimed = self.claim(100) or ()
        for call in claimed:
            answer(self, call)
        for order in self.orders():
            held = self.held.get(order.get("id", ""))
            if held is not None and order["op"] == "cancel":
                self.finish(held, "partial", RequestState.CANCELLED)
        if not claimed:
            self.db.blpop([self.keys.bell(self.engine)], timeout=_WAKE_S)


def patient(settings: Settings) -> Settings:
    """Long leases, for tests that drive workers by hand on a busy machine: no engine counts as dead."""
    return settings.model_copy(update={"lease_ms": 60_000})


@contextmanager
def routing(settings: Settings, policy: Policy | None = None) -> Iterator[Router]:
    """Runs a router in a thread until the block is left."""
    router = Router(settings, policy)
    thread = threading.Thread(target=router.run, name=router.name)
    thread.start()
    try:
        yield router
    finally:
        router.stop()
        thread.join()


def echo(worker: FakeWorker, call: Claimed) -> None:
    """Answers with the prompt. A streamed call gets it word by word."""
    prompt = str(codec.decode(call.body, call.body_field).get("prompt", ""))
    if call.stream:
        worker.publish(call, *prompt.split())
    worker.finish(call, prompt)


def hold(worker: FakeWorker, call: Claimed) -> None:
    """Does not answer: the call keeps running."""


def refuse(worker: FakeWorker, call: Claimed) -> None:
    worker.fail(call)
