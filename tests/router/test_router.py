"""The router: what it rejects, what it shares with other routers, and which faults it survives."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis

from rsm.broker import CallRecord, Client, RequestState, Settings
from rsm.broker import child_process as child
from rsm.broker.connection import execute
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.protocol import codec
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.keys import ROUTER_GROUP, Keys
from rsm.broker.protocol.models import ErrorCode
from rsm.broker.protocol.transitions import Claimed, EngineView, SessionView, Transitions
from rsm.router import router as router_module
from rsm.router.maintenance import Maintenance
from rsm.router.policies.least_loaded import LeastLoaded
from rsm.router.router import Router
from rsm.router.views import CallView, Choice
from tests.support.fake_worker import FakeWorker, echo, hold, patient, routing
from tests.support.waiting import eventually

HI = '{"prompt":"hi"}'
LIMIT = 4096


@pytest.fixture
def quick(settings: Settings) -> Settings:
    """A short lease, for tests that wait until it expires; long enough that it does not expire on a busy machine."""
    return settings.model_copy(update={"lease_ms": 1500, "tick_ms": 20, "batch": 16})


class Producer:
    """Pushes with bare XADD and reads records, as a program in any language can."""

    def __init__(self, db: Any, keys: Keys) -> None:
        self.db = db
        self.keys = keys

    def push(self, **fields: str | bytes | int) -> str:
        return codec.text(self.db.xadd(self.keys.calls, fields))

    def push_many(self, ids: Sequence[str], **fields: str | bytes | int) -> None:
        pipe = self.db.pipeline(transaction=False)
        for call_id in ids:
            pipe.xadd(self.keys.calls, {"id": call_id, "json": HI, **fields})
        pipe.execute()

    def record(self, call_id: str) -> CallRecord:
        return CallRecord.from_hash(call_id, self.db.hgetall(self.keys.call(call_id)))

    def state(self, call_id: str) -> str:
        return codec.text(self.db.hget(self.keys.call(call_id), "state"))

    def states(self, ids: Sequence[str]) -> Counter[str]:
        pipe = self.db.pipeline(transaction=False)
        for call_id in ids:
            pipe.hget(self.keys.call(call_id), "state")
        return Counter(codec.text(s) for s in pipe.execute())

    def await_end(self, ids: Sequence[str]) -> None:
        eventually(lambda: self.states(ids) == {"COMPLETED": len(ids)}, progress=lambda: self.states(ids))

    def dead(self) -> list[dict[str, str]]:
        return [{codec.text(k): codec.text(v) for k, v in f.items()} for _, f in self.db.xrange(self.keys.dead)]

    def backlog(self) -> int:
        return int(self.db.xlen(self.keys.calls))


@pytest.fixture
def producer(db: redis.Redis, keys: Keys) -> Producer:
    return Producer(db, keys)


# -- bare pushes


def test_a_json_push_gives_a_json_result(settings: Settings, producer: Producer) -> None:
    with routing(settings), FakeWorker(settings).serving(echo):
        entry = producer.push(json=HI)
        producer.push(id="c1", session="s1", json='{"prompt":"good morning","max_tokens":64}')
        producer.await_end([entry, "c1"])
    record = producer.db.hgetall(producer.keys.call("c1"))
    assert json.loads(record[b"result"])["text"] == "good morning"
    assert producer.record("c1").session_id == "s1"
    assert producer.record(entry).session_id == entry, "the id is the entry's, the session the call's own"
    assert producer.backlog() == 0
    assert not producer.db.xpending(producer.keys.calls, ROUTER_GROUP)["pending"]


def test_a_msgpack_push_gives_a_msgpack_result(settings: Settings, producer: Producer) -> None:
    with routing(settings), FakeWorker(settings).serving(echo):
        producer.push(id="c1", body=msgpack.packb({"prompt": "hi"}))
        producer.await_end(["c1"])
    assert msgpack.unpackb(producer.db.hget(producer.keys.call("c1"), "result"))["text"] == "hi"


def test_a_bare_push_can_have_an_inbox(settings: Settings, producer: Producer) -> None:
    with routing(settings), FakeWorker(settings).serving(echo):
        producer.push(id="c1", json='{"prompt":"one two"}', stream="1", inbox="box")
        producer.push(id="bad", json="{", inbox="box")
        producer.await_end(["c1"])
        eventually(lambda: producer.db.xlen(producer.keys.inbox("box")) == 4)
    events = [f for _, f in producer.db.xrange(producer.keys.inbox("box"))]
    assert [e[b"text"] for e in events if b"text" in e] == [b"one", b"two"]
    assert {e[b"call"]: e[b"state"] for e in events if b"state" in e} == {b"c1": b"COMPLETED", b"bad": b"FAILED"}


def test_a_client_can_await_a_bare_push(settings: Settings, client: Client, producer: Producer) -> None:
    producer.push(id="c1", json=HI)
    with routing(settings), FakeWorker(settings).serving(echo):
        eventually(lambda: producer.state("c1"))
        assert client.result("c1", 20).text == "hi"


# -- what is refused

BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("no body", {}, "invalid_request", "neither"),
    ("both bodies", {"json": HI, "body": b"\x80"}, "invalid_request", "both"),
    ("broken msgpack", {"body": b"\x81\xa6prom"}, "invalid_request", "not valid msgpack"),
    ("broken JSON", {"json": '{"prompt":'}, "invalid_request", "not valid JSON"),
    ("JSON that is no text", {"json": b"\xff\xfe\xfd"}, "invalid_request", "not valid JSON"),
    ("a lone surrogate", {"json": '{"prompt":"\\ud83d"}'}, "invalid_request", "not valid JSON"),
    ("JSON, not a map", {"json": "[1,2]"}, "invalid_request", "must be a map"),
    ("msgpack, not a map", {"body": b"\x01"}, "invalid_request", "must be a map"),
    ("no prompt", {"json": '{"max_tokens":5}'}, "invalid_request", '"prompt"'),
    ("an empty prompt", {"json": '{"prompt":""}'}, "invalid_request", "non-empty text"),
    ("a prompt of numbers", {"json": '{"prompt":[1]}'}, "invalid_request", "must be non-empty text"),
    ("unknown kind", {"json": HI, "kind": "images"}, "invalid_request", "kind must be one of"),
    ("a body too large", {"json": json.dumps({"prompt": "x" * LIMIT})}, "invalid_request", "RSM_MAX_BODY_BYTES"),
    (
        "an unknown model",
        {"json": HI, "model": "gpt-9"},
        "no_engine_for_model",
        "No engine serves .* Available models: m",
    ),
    ("no model's name", {"json": HI, "model": "a b"}, "invalid_request", "model must be"),
    ("a passed deadline", {"json": HI, "deadline_ms": 1}, "deadline_exceeded", "deadline passed"),
    ("a deadline in words", {"json": HI, "deadline_ms": "soon"}, "invalid_request", "deadline_ms must be a whole"),
    ("a priority in words", {"json": HI, "priority": "high"}, "invalid_request", "priority must be a whole number"),
    ("half a priority", {"json": HI, "priority": "1.5"}, "invalid_request", "priority must be a whole number"),
    ("a huge priority", {"json": HI, "priority": "9" * 5000}, "invalid_request", "priority must be a whole number"),
    ("a priority out of range", {"json": HI, "priority": "128"}, "invalid_request", "priority"),
    ("negative tokens", {"json": HI, "prompt_tokens": "-1"}, "invalid_request", "prompt_tokens"),
    ("a session's forbidden name", {"json": HI, "session": "a b"}, "invalid_request", "session must be"),
    ("an inbox's forbidden name", {"json": HI, "inbox": "{x}"}, "invalid_request", "inbox must be"),
    ("an unknown wish", {"json": HI, "on_engine_loss": "weep"}, "invalid_request", "on_engine_loss"),
    ("a long traceparent", {"json": HI, "traceparent": "x" * 300}, "invalid_request", "traceparent"),
    ("a reference to nothing", {"ref": "1"}, "invalid_request", "does not exist"),
    ("a return of nothing", {"gen": "5-1"}, "invalid_request", "does not exist"),
]

UNUSABLE: list[str | bytes] = ["", "a b", "{x}", "a*", "a\nb", b"\xff", "é", "x" * 129, "c1:events", "é" * 100]


@contextmanager
def one_round(settings: Settings) -> Iterator[Callable[[], int]]:
    """A router without a thread: each call of the function places the entries of the stream."""
    router = Router(settings.model_copy(update={"max_body_bytes": LIMIT, "tick_ms": 20}))
    router._prepare()
    yield lambda: router.place(router._read())
    router._redis.close()


@pytest.fixture
def place(settings: Settings) -> Iterator[Callable[[], int]]:
    with one_round(settings) as step:
        yield step


@pytest.fixture
def ready(settings: Settings) -> Iterator[FakeWorker]:
    """An engine that takes calls."""
    fake = FakeWorker(settings).up()
    yield fake
    fake.close()


def assert_a_sentence(message: str) -> None:
    assert re.fullmatch(r"[A-Z\"a-z][^\n]{10,300}\.", message), message


@pytest.mark.parametrize(("fields", "code", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_entry_gets_a_failed_record(
    place: Callable[[], int], ready: FakeWorker, producer: Producer, fields: dict[str, Any], code: str, says: str
) -> None:
    producer.push(id="bad", **fields)
    producer.push(id="good", json=HI)
    place()
    record = producer.record("bad")
    assert (record.state, record.error_code) == (RequestState.FAILED, code)
    assert code in set(ErrorCode)
    assert re.search(says, record.error)
    assert_a_sentence(record.error)
    assert not producer.dead()
    assert producer.record("good").engine_id == "e1", "the stream continues"
    assert producer.backlog() == 0


@pytest.mark.parametrize("call_id", UNUSABLE, ids=[str(i)[:12] for i in range(len(UNUSABLE))])
def test_an_entry_with_an_unusable_id_becomes_a_dead_letter(
    place: Callable[[], int], ready: FakeWorker, producer: Producer, call_id: str | bytes
) -> None:
    entry = producer.push(id=call_id, json=HI, inbox="box")
    producer.push(id="good", json=HI)
    place()
    (letter,) = producer.dead()
    assert (letter["id"], letter["entry"], letter["error_code"]) == ("", entry, "invalid_request")
    assert_a_sentence(letter["error"])
    assert len(letter["error"]) < 200, "the id is not quoted at length"
    assert producer.db.xlen(producer.keys.inbox("box")) == 1
    assert producer.record("good").engine_id == "e1"
    assert producer.backlog() == 0


def test_a_body_at_the_limit_is_taken(place: Callable[[], int], ready: FakeWorker, producer: Producer) -> None:
    room = LIMIT - len(json.dumps({"prompt": ""}))
    producer.push(id="fits", json=json.dumps({"prompt": "x" * room}))
    producer.push(id="not", json=json.dumps({"prompt": "x" * (room + 1)}))
    place()
    assert (producer.state("fits"), producer.state("not")) == ("PENDING", "FAILED")


def test_the_same_push_twice_is_one_call(place: Callable[[], int], ready: FakeWorker, producer: Producer) -> None:
    for _ in range(2):
        producer.push(id="c1", json=HI)
    place()
    producer.push(id="c1", json=HI)
    place()
    assert len(ready.claim() or ()) == 1
    producer.push(id="c1", json=HI)
    place()
    assert ready.claim() == []
    assert (producer.backlog(), producer.dead()) == (0, [])
    assert producer.record("c1").attempt == 1


def test_another_body_under_the_same_id_is_a_conflict(
    place: Callable[[], int], ready: FakeWorker, producer: Producer
) -> None:
    producer.push(id="c1", json=HI)
    producer.push(id="c1", json='{"prompt":"bye"}')
    place()
    producer.push(id="c1", json=HI, kind="completions")
    place()
    assert [(d["id"], d["error_code"]) for d in producer.dead()] == [("c1", "conflict")] * 2
    for letter in producer.dead():
        assert_a_sentence(letter["error"])
    call = ready.take()
    assert call.body == HI.encode(), "the first one runs, as if nothing had happened"
    assert ready.finish(call) == "done"
    assert producer.backlog() == 0


def test_a_bad_push_under_a_good_calls_id_leaves_it_alone(
    place: Callable[[], int], ready: FakeWorker, producer: Producer
) -> None:
    producer.push(id="c1", json=HI)
    place()
    producer.push(id="c1", json="{")
    place()
    assert producer.state("c1") == "PENDING"
    assert [(d["id"], d["error_code"]) for d in producer.dead()] == [("c1", "invalid_request")]


def test_a_forged_reference_cannot_stop_the_router(
    place: Callable[[], int], ready: FakeWorker, producer: Producer, client: Client
) -> None:
    """Tokens that overflow a counter would break the script, and so every router that reads the entry."""
    client.submit("hi", id="c1")
    gen = producer.db.hget(producer.keys.call("c1"), "gen")
    producer.db.xdel(producer.keys.calls, gen)
    producer.push(id="c1", gen=gen, prompt_tokens="9" * 400)
    producer.push(id="good", json=HI)
    place()
    assert producer.record("good").engine_id == "e1"


def test_an_engine_that_has_just_come_is_known(
    place: Callable[[], int], ready: FakeWorker, settings: Settings, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router's view of the fleet may be out of date, but a rejection is final."""
    monkeypatch.setattr(router_module, "_SNAPSHOT_S", 60.0)
    producer.push(id="c1", json=HI)
    place()
    newcomer = FakeWorker(settings, "e2", "m2").up()
    producer.push(id="c2", json=HI, model="m2")
    place()
    assert (producer.state("c2"), producer.record("c2").engine_id) == ("PENDING", "e2")
    newcomer.close()


def test_an_engine_that_has_just_gone_gets_no_calls(
    place: Callable[[], int], ready: FakeWorker, settings: Settings, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "_SNAPSHOT_S", 60.0)
    producer.push_many(["c1"])
    place()
    execute.run(producer.db, Transitions(producer.keys, settings).drain("e1"))
    newcomer = FakeWorker(settings, "e2").up()
    producer.push_many(["c2"])
    place()
    place()
    assert {producer.record(c).engine_id for c in ("c1", "c2")} == {"e2"}
    newcomer.close()


def test_a_storm_of_bad_entries(settings: Settings, producer: Producer) -> None:
    """All of them at once, through a running router, with good entries between them."""
    small = settings.model_copy(update={"max_body_bytes": LIMIT})
    good = []
    for i, (_, fields, _, _) in enumerate(BAD):
        producer.push(id=f"bad{i}", **fields)
        good.append(f"good{i}")
        producer.push(id=good[-1], json=HI)
    for call_id in UNUSABLE:
        producer.push(id=call_id, json=HI)
    with FakeWorker(small).serving(echo), routing(small):
        producer.await_end(good)
        eventually(lambda: producer.backlog() == 0)
    assert producer.states([f"bad{i}" for i in range(len(BAD))]) == {"FAILED": len(BAD)}
    assert len(producer.dead()) == len(UNUSABLE)


# -- several routers


class Counting(LeastLoaded):
    """Records which calls this router placed."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.placed: list[str] = []

    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        self.placed.append(call.session)
        return super().choose(call, engines, session)


def test_several_routers_share_the_work(quick: Settings, producer: Producer, client: Client) -> None:
    relaxed = patient(quick).model_copy(update={"batch": 8})
    policies = [Counting(relaxed) for _ in range(3)]
    ran: list[str] = []

    def answer(worker: FakeWorker, call: Claimed) -> None:
        ran.append(call.fence.call_id)
        worker.finish(call)

    with ExitStack() as stack:
        for policy in policies:
            stack.enter_context(routing(relaxed, policy))
        for e in ("e1", "e2"):
            stack.enter_context(FakeWorker(relaxed, e).serving(answer))
        raw = [f"raw{i}" for i in range(200)]
        producer.push_many(raw)
        sent = [h.id for h in client.submit_many([client.prepare(f"call {i}") for i in range(200)])]
        producer.await_end([*raw, *sent])
        eventually(lambda: producer.backlog() == 0)
    assert sorted(ran) == sorted([*raw, *sent]), "each ran once"
    placed = [call for policy in policies for call in policy.placed]
    assert sorted(placed) == sorted([*raw, *sent]), "and was placed once"
    assert sum(bool(p.placed) for p in policies) > 1
    assert sum(codec.number(producer.db.hget(producer.keys.engine(e), "served")) for e in ("e1", "e2")) == 400
    assert {producer.record(c).attempt for c in raw} == {1}


def test_a_router_that_leaves_takes_its_consumer_along(settings: Settings, producer: Producer) -> None:
    with routing(settings) as router:
        producer.push_many(["c1"])
        eventually(lambda: _consumers(producer) == [router.name])
    assert _consumers(producer) == []


def _consumers(producer: Producer) -> list[str]:
    try:
        return [codec.text(c["name"]) for c in producer.db.xinfo_consumers(producer.keys.calls, ROUTER_GROUP)]
    except redis.ResponseError:  # the group does not exist yet
        return []


# -- deaths


def test_the_entries_of_a_dead_router_are_taken_over(quick: Settings, producer: Producer, client: Client) -> None:
    """It read the entries, accepted one of them, and died."""
    ids = [f"c{i}" for i in range(40)]
    producer.push_many(ids[:20])
    client.submit_many([client.prepare("hi", id=i) for i in ids[20:]])
    producer.push(id="bad", json="{")
    producer.db.xgroup_create(producer.keys.calls, ROUTER_GROUP, id="0")
    read = producer.db.xreadgroup(ROUTER_GROUP, "ghost", {producer.keys.calls: ">"})
    assert len(read[0][1]) == 41
    ghost = Router(quick)
    arrivals, _ = ghost._sort(read[0][1][:1])
    raw = [a.raw for a in arrivals if a.raw]
    assert execute.run(producer.db, Transitions(producer.keys, quick).accept(raw)) == ["new"]
    ghost._redis.close()
    with routing(quick), FakeWorker(quick).serving(echo):
        producer.await_end(ids)
        eventually(lambda: producer.state("bad") == "FAILED")
    assert producer.backlog() == 0
    assert codec.number(producer.db.hget(producer.keys.stats, "submitted")) == len(ids) + 1


def test_idle_consumers_are_deleted_and_busy_ones_are_not(settings: Settings, producer: Producer) -> None:
    producer.db.xgroup_create(producer.keys.calls, ROUTER_GROUP, id="0", mkstream=True)
    producer.db.xgroup_createconsumer(producer.keys.calls, ROUTER_GROUP, "idle")
    producer.push(id="c1", json=HI)
    producer.db.xreadgroup(ROUTER_GROUP, "busy", {producer.keys.calls: ">"})
    hasty = settings.model_copy(update={"lease_ms": 1})
    maintenance = Maintenance(producer.db, producer.keys, hasty, "me")

    def deleted() -> bool:
        maintenance._drop_idle_consumers()
        return _consumers(producer) == ["busy"]

    eventually(deleted)
    assert producer.db.xpending(producer.keys.calls, ROUTER_GROUP)["pending"] == 1


@contextmanager
def router_process(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m rsm.router`."""
    process = child.spawn(
        [sys.executable, "-P", "-m", "rsm.router"], env=_environment(settings), output=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        child.stop(process, grace_s=10)


def _environment(settings: Settings) -> Mapping[str, str]:
    return {**os.environ, **settings.environment()}


def test_a_router_killed_under_load_loses_nothing(quick: Settings, producer: Producer) -> None:
    ids = [f"c{i}" for i in range(1200)]
    warm: list[str] = []

    def both_work() -> bool:
        warm.append(f"warm{len(warm)}")
        producer.push_many(warm[-1:])
        return len(_consumers(producer)) == 2

    def push() -> None:
        for i in range(0, len(ids), 40):
            producer.push_many(ids[i : i + 40])

    with router_process(quick) as victim, router_process(quick), FakeWorker(quick).serving(echo):
        eventually(both_work)
        pusher = threading.Thread(target=push)
        pusher.start()
        eventually(lambda: producer.states(ids)["COMPLETED"] > 20)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(10) == -signal.SIGKILL
        pusher.join()
        ids += warm
        producer.await_end(ids)
        eventually(lambda: producer.backlog() == 0)
    assert codec.number(producer.db.hget(producer.keys.stats, "submitted")) == len(ids)
    assert codec.number(producer.db.hget(producer.keys.stats, "completed")) == len(ids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_router_process_ends_on_a_signal(quick: Settings, producer: Producer, number: signal.Signals) -> None:
    with router_process(quick) as process:
        producer.push_many(["c1"])
        eventually(lambda: _consumers(producer))
        process.send_signal(number)
        assert process.wait(10) == 0
    assert _consumers(producer) == []


def test_a_dead_engines_calls_go_to_another(quick: Settings, producer: Producer) -> None:
    ids = [f"c{i}" for i in range(20)]
    with routing(quick):
        with FakeWorker(quick, "e1").serving(hold) as doomed:
            producer.push_many(ids[:10])
            eventually(lambda: producer.states(ids[:10]) == {"RUNNING": 10})
            producer.push_many(ids[10:])
            eventually(lambda: producer.states(ids) == {"RUNNING": 20})
            calls = dict(doomed.held)
        with FakeWorker(quick, "e2").serving(echo):
            producer.await_end(ids)
    assert set(calls) == set(ids)
    assert {producer.record(c).engine_id for c in ids} == {"e2"}
    assert min(producer.record(c).attempt for c in ids) == 2
    assert producer.db.hget(producer.keys.engine("e1"), "state") == b"DEAD"


def test_an_engine_that_dies_waiting_gives_its_queue_to_another(quick: Settings, producer: Producer) -> None:
    idle = FakeWorker(quick, "e1").up()
    with routing(quick):
        producer.push_many(["c1", "c2"])
        eventually(lambda: producer.db.zcard(producer.keys.queue("e1")) == 2)
        with FakeWorker(quick, "e2").serving(echo):
            producer.await_end(["c1", "c2"])
    assert {producer.record(c).engine_id for c in ("c1", "c2")} == {"e2"}
    idle.close()


def test_a_drained_engines_queue_goes_to_another(settings: Settings, producer: Producer) -> None:
    transitions = Transitions(producer.keys, settings)
    drained = FakeWorker(settings, "e1").up()
    with routing(patient(settings)):
        producer.push_many(["c1", "c2"])
        eventually(lambda: producer.db.zcard(producer.keys.queue("e1")) == 2)
        with FakeWorker(settings, "e2").serving(echo):
            assert execute.run(producer.db, transitions.drain("e1")) == 2
            producer.await_end(["c1", "c2"])
            producer.push_many(["c3"])
            producer.await_end(["c3"])
    assert producer.record("c3").engine_id == "e2"
    drained.close()


# -- parked calls


def test_calls_wait_for_the_first_engine(settings: Settings, producer: Producer) -> None:
    """Pushed before the first router starts, and placed before the first engine starts."""
    ids = [f"c{i}" for i in range(10)]
    producer.push_many(ids[:5])
    producer.push_many(ids[5:], model="m")
    with routing(patient(settings)):
        eventually(lambda: producer.backlog() == 0)
        assert producer.states(ids) == {"PENDING": 10}
        assert {producer.db.zcard(producer.keys.parked(m)) for m in ("", "m")} == {5}
        assert producer.record("c0").why
        with FakeWorker(settings, model="other").serving(echo):
            producer.await_end(ids[:5])
            assert producer.states(ids[5:]) == {"PENDING": 5}, "no engine serves their model yet"
            with FakeWorker(settings, "e2", model="m").serving(echo):
                producer.await_end(ids[5:])
    assert {producer.record(c).engine_id for c in ids[5:]} == {"e2"}
    assert {producer.record(c).attempt for c in ids} == {1}


def test_a_parked_call_is_weighed_as_any_other(settings: Settings, client: Client, producer: Producer) -> None:
    """A long prompt that had to wait for an engine still binds its session."""
    with routing(patient(settings)):
        client.submit("hi", id="c1", session="s", prompt_tokens=5000)
        eventually(lambda: producer.db.zcard(producer.keys.parked("")))
        worker = FakeWorker(settings).up()
        eventually(lambda: producer.record("c1").engine_id == "e1")
        assert producer.db.hget(producer.keys.engine("e1"), "queued_tokens") == b"5000"
        assert producer.db.hget(producer.keys.session("s"), "engine") == b"e1"
    worker.close()


def test_an_engine_that_starts_is_waited_for(settings: Settings, producer: Producer) -> None:
    worker = FakeWorker(settings)
    worker.register()
    with routing(patient(settings)):
        producer.push(id="c1", json=HI, model="m")
        eventually(lambda: producer.db.zcard(producer.keys.parked("m")))
        producer.push(id="c2", json=HI, model="unknown")
        eventually(lambda: producer.state("c2") == "FAILED")
        assert "Available models: m." in producer.record("c2").error
        worker.beat()
        worker.finish(worker.take_soon())
    assert producer.state("c1") == "COMPLETED"
    worker.close()


def test_a_parked_calls_deadline_holds(settings: Settings, producer: Producer, client: Client) -> None:
    with routing(settings):
        producer.push(id="c1", json=HI, deadline_ms=client.deadline_in(0.1))
        eventually(lambda: producer.state("c1") == "FAILED")
    assert producer.record("c1").error_code == "deadline_exceeded"
    assert not producer.db.exists(producer.keys.parked(""))


# -- faults of Redis


@pytest.mark.parametrize(
    "harm", ["delete the stream", "flush the scripts", "destroy the group", "kill the connections"]
)
def test_the_router_outlives(settings: Settings, producer: Producer, harm: str) -> None:
    with routing(settings), FakeWorker(settings).serving(echo):
        producer.push_many(["before"])
        producer.await_end(["before"])
        if harm == "delete the stream":
            producer.db.delete(producer.keys.calls)
        elif harm == "flush the scripts":
            producer.db.script_flush()
        elif harm == "destroy the group":
            producer.db.xgroup_destroy(producer.keys.calls, ROUTER_GROUP)
        else:
            producer.db.client_kill_filter(_type="normal")
        producer.push_many(["after"])
        producer.await_end(["after"])


def test_the_router_outlives_a_dead_redis() -> None:
    folder = Path(f"/tmp/rsm-kill-{new_id()}")
    own = EmbeddedRedis(folder)
    settings = Settings(lease_ms=1500, tick_ms=50).with_redis(own.start())
    server = redis.Redis.from_url(own.url)
    producer = Producer(server, Keys(settings.namespace))
    ids = [f"c{i}" for i in range(50)]
    server.config_set("appendfsync", "always")  # otherwise a kill may lose the last writes
    try:
        with routing(settings):
            producer.push_many(ids)
            eventually(lambda: producer.backlog() == 0, what="all are parked")
            own.kill()
            own.start()
            with FakeWorker(settings).serving(echo):
                producer.await_end(ids)
                producer.push_many(["after"])
                producer.await_end(["after"])
                assert {producer.record(c).attempt for c in ids} == {1}
    finally:
        server.close()
        own.stop()
        shutil.rmtree(folder)


def test_an_outage_of_redis_is_not_a_death_of_engines(quick: Settings, producer: Producer) -> None:
    """Leases that expired while no worker could renew them prove nothing."""
    worker = FakeWorker(quick).up()
    maintenance = Maintenance(producer.db, producer.keys, quick, "me")
    producer.db.xgroup_create(producer.keys.calls, ROUTER_GROUP, id="0", mkstream=True)
    producer.db.zadd(producer.keys.engines, {"e1": 1})
    maintenance.note_outage()
    maintenance.tick()
    assert producer.db.hget(producer.keys.engine("e1"), "state") == b"READY"

    def reaped() -> bool:
        maintenance.tick()
        return bool(producer.db.hget(producer.keys.engine("e1"), "state") == b"DEAD")

    eventually(reaped)
    worker.close()
