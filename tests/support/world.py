"""A namespace in which a test runs one script at a time and can read every key."""

from __future__ import annotations

from typing import Any

from chaos.leaks import LASTING
from rsm.broker import Settings
from rsm.broker.client.request import build
from rsm.broker.client.session_tree import TreeCancel
from rsm.broker.connection import execute
from rsm.broker.protocol import codec
from rsm.broker.protocol.keys import ROUTER_GROUP, Keys
from rsm.broker.protocol.models import CallRequest
from rsm.broker.protocol.scripts import Command, T
from rsm.broker.protocol.transitions import Placed, Placement, RawCall, Rejection, Submission, Submitted, Transitions
from tests.support.fake_worker import FakeWorker

LONG_AGO = 1


class Fields(dict[str, str]):
    """A hash or an entry. A missing field reads as empty."""

    def __missing__(self, name: str) -> str:
        return ""

    def ints(self, *names: str) -> tuple[int, ...]:
        return tuple(codec.number(self[name]) for name in names)


class World:
    """One namespace: the steps of producers and of a router, and readers for every key."""

    def __init__(self, db: Any, settings: Settings) -> None:
        self.db = db
        self.settings = settings
        self.keys = Keys(settings.namespace)
        self.transitions = Transitions(self.keys, settings)
        db.xgroup_create(self.keys.calls, ROUTER_GROUP, id="0", mkstream=True)

    def run(self, command: Command[T]) -> T:
        return execute.run(self.db, command)

    # -- steps

    def prepare(self, call_id: str, prompt: str = "hi", prompt_tokens: int = 10, **options: Any) -> Submission:
        return build(prompt, max_body_bytes=1 << 20, id=call_id, prompt_tokens=prompt_tokens, **options)

    def submit(self, call_id: str, prompt: str = "hi", **options: Any) -> Submitted:
        return self.run(self.transitions.submit([self.prepare(call_id, prompt, **options)]))[0]

    def push(self, call_id: str, body: str = '{"prompt":"hi"}', **fields: Any) -> str:
        """A bare XADD. Returns the entry's id."""
        return codec.text(self.db.xadd(self.keys.calls, {"id": call_id, "json": body, **fields}))

    def raw_call(self, entry: str, call_id: str, body: str = '{"prompt":"hi"}', **fields: Any) -> RawCall:
        request = CallRequest(id=call_id, **{"session": call_id, **fields})
        return RawCall(entry, request, codec.digest(request.kind, request.model, body.encode()), "json")

    def accept(self, *args: Any, **fields: Any) -> str:
        return self.run(self.transitions.accept([self.raw_call(*args, **fields)]))[0]

    def reject(self, entry: str, call_id: str, gen: str = "", inbox: str = "") -> str:
        refusal = Rejection(entry, call_id, gen, call_id, inbox, "invalid_request", "It is wrong.")
        return self.run(self.transitions.reject([refusal]))[0]

    def placement(self, call_id: str, engine: str = "e1", **changes: Any) -> Placement:
        entry, fields = self.entry_of(call_id)
        defaults = Placement(entry, call_id, fields.get("gen", ""), engine, False, "", None, "a test says so")
        return defaults._replace(**changes)

    def assign(self, call_id: str, engine: str = "e1", **changes: Any) -> Placed:
        return self.run(self.transitions.assign([self.placement(call_id, engine, **changes)]))[0]

    def queue(self, call_id: str, engine: str = "e1", **options: Any) -> None:
        """Submits and assigns a call."""
        assert self.submit(call_id, **options).code == "new"
        assert self.assign(call_id, engine).code == "assigned"

    def worker(self, engine: str = "e1", model: str = "m") -> FakeWorker:
        return FakeWorker(self.settings, engine, model, server=self.db).up()

    def start(self, call_id: str, worker: FakeWorker, **options: Any) -> Any:
        """Submits, assigns and claims a call."""
        self.queue(call_id, worker.engine, **options)
        return worker.take()

    def cancel(self, call_id: str, reason: str = "enough") -> str:
        return self.run(self.transitions.cancel(call_id, reason))

    def cancel_session(self, session: str, reason: str = "enough", descendants: bool = True) -> int:
        tree = TreeCancel(self.transitions, session, reason, descendants)
        while command := tree.command():
            tree.take(self.run(command))
        return tree.ended

    def charge(self, session: str, service: int, waited_ms: int = 0, ran_ms: int = 0, call_id: str = "none") -> int:
        """Charges a session as if one of its calls had ended. Returns its program's service.

        Args:
            call_id: if it has a record, the call counts as assigned, else as sequential.
        """
        return self.run(self.transitions.session("charge", session, call_id, service, waited_ms, ran_ms))

    def read(self, router: str) -> None:
        """Lets a router read all new entries."""
        self.db.xreadgroup(ROUTER_GROUP, router, {self.keys.calls: ">"})

    def with_settings(self, **changes: Any) -> Transitions:
        return Transitions(self.keys, self.settings.model_copy(update=changes))

    def expired(self) -> Transitions:
        """Transitions for which the result TTL of all finished calls has passed."""
        return self.with_settings(result_ttl_s=0)

    def lapse(self, engine: str = "e1") -> None:
        """Ends the lease of an engine."""
        self.db.zadd(self.keys.engines, {engine: LONG_AGO})

    def forget(self, call_id: str) -> None:
        """Lets a record expire, with its log."""
        self.db.delete(self.keys.call(call_id), self.keys.events(call_id))

    def die(self, worker: FakeWorker) -> FakeWorker:
        """Lets a worker die and restart. Its calls are assigned to it again."""
        self.run(self.transitions.reap(worker.engine, worker.incarnation))
        restarted = self.worker(worker.engine)
        for _, fields in self.stream():
            self.assign(fields["id"], worker.engine)
        return restarted

    # -- state

    def record(self, call_id: str) -> Fields:
        return texts(self.db.hgetall(self.keys.call(call_id)))

    def state(self, call_id: str) -> str:
        return self.record(call_id)["state"]

    def result(self, call_id: str) -> dict[str, Any]:
        return codec.decode(self.db.hget(self.keys.call(call_id), "result"))

    def stream(self) -> list[tuple[str, Fields]]:
        return [(codec.text(e), texts(f)) for e, f in self.db.xrange(self.keys.calls)]

    def entry_of(self, call_id: str) -> tuple[str, Fields]:
        return next((e, f) for e, f in self.stream() if f.get("id") == call_id)

    def events(self, inbox: str) -> list[Fields]:
        return [texts(f) for _, f in self.db.xrange(self.keys.inbox(inbox))]

    def log(self, call_id: str) -> list[tuple[str, Fields]]:
        return [(codec.text(e), texts(f)) for e, f in self.db.xrange(self.keys.events(call_id))]

    def dead(self) -> list[Fields]:
        return [texts(f) for _, f in self.db.xrange(self.keys.dead)]

    def engine(self, engine: str = "e1") -> Fields:
        return texts(self.db.hgetall(self.keys.engine(engine)))

    def session(self, session: str) -> Fields:
        return texts(self.db.hgetall(self.keys.session(session)))

    def children(self, session: str) -> set[str]:
        return {codec.text(m) for m in self.db.zrange(self.keys.session_children(session), 0, -1)}

    def open_calls(self, session: str) -> set[str]:
        return {codec.text(m) for m in self.db.smembers(self.keys.session_calls(session))}

    def waiting(self, engine: str = "e1") -> list[str]:
        return [codec.text(m) for m in self.db.zrange(self.keys.queue(engine), 0, -1)]

    def starving(self, engine: str = "e1") -> dict[str, int]:
        """Calls that will starve, and the time of it."""
        return {codec.text(m): int(t) for m, t in self.db.zrange(self.keys.starving(engine), 0, -1, withscores=True)}

    def running(self, engine: str = "e1") -> list[str]:
        return [codec.text(m) for m in self.db.zrange(self.keys.running(engine), 0, -1)]

    def stat(self, name: str) -> int:
        return codec.number(self.db.hget(self.keys.stats, name))

    def leaks(self) -> list[str]:
        own = (k for k in self.db.scan_iter() if k.decode().startswith(self.keys.prefix))
        names = (k.decode().removeprefix(self.keys.prefix) for k in own if self.db.ttl(k) == -1)
        return [n for n in names if not LASTING.fullmatch(n) and not self._open(n)]

    def _open(self, name: str) -> bool:
        if name.startswith("residency:"):
            return bool(self.open_calls(name[10:]))
        return name.startswith("call:") and self.state(name[5:].removesuffix(":events")) in ("PENDING", "RUNNING")


def texts(fields: Any) -> Fields:
    return Fields({codec.text(k): codec.text(v) for k, v in fields.items()})


def now_ms(world: World) -> int:
    seconds, _ = world.db.time()
    return int(seconds) * 1000
