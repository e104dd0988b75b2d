"""Each script in broker/lua, against a real server and against fakeredis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest

from broker import RequestState, Settings, codec, scripts
from broker.connection import connect
from broker.keys import ROUTER_GROUP, Keys
from broker.models import CallRequest
from broker.request import build
from broker.scripts import Command, T
from broker.transitions import (
    Admission,
    Claimed,
    Differences,
    Event,
    Finish,
    Placed,
    Placement,
    Rejection,
    Submission,
    Submitted,
    Transitions,
)
from chaos.leaks import LASTING
from tests.fake_worker import FakeWorker

LONG_AGO = 1


class Fields(dict[str, str]):
    """A hash or an entry. Fields that are empty or zero need not be stored."""

    def __missing__(self, name: str) -> str:
        return ""

    def ints(self, *names: str) -> tuple[int, ...]:
        return tuple(codec.number(self[name]) for name in names)


class World:
    """One namespace: a router and producers that act one step at a time, and eyes on every key."""

    def __init__(self, db: Any, settings: Settings) -> None:
        self.db = db
        self.settings = settings
        self.keys = Keys(settings.namespace)
        self.transitions = Transitions(self.keys, settings)
        db.xgroup_create(self.keys.calls, ROUTER_GROUP, id="0", mkstream=True)

    def run(self, command: Command[T]) -> T:
        return scripts.run(self.db, command)

    # -- steps

    def prepare(self, call_id: str, prompt: str = "hi", prompt_tokens: int = 10, **options: Any) -> Submission:
        return build(prompt, max_body_bytes=1 << 20, id=call_id, prompt_tokens=prompt_tokens, **options)

    def submit(self, call_id: str, prompt: str = "hi", **options: Any) -> Submitted:
        return self.run(self.transitions.submit([self.prepare(call_id, prompt, **options)]))[0]

    def push(self, call_id: str, body: str = '{"prompt":"hi"}', **fields: Any) -> str:
        """A bare XADD; returns its entry."""
        return codec.text(self.db.xadd(self.keys.calls, {"id": call_id, "json": body, **fields}))

    def admission(self, entry: str, call_id: str, body: str = '{"prompt":"hi"}', **fields: Any) -> Admission:
        request = CallRequest(id=call_id, **{"session": call_id, **fields})
        return Admission(entry, request, codec.digest(request.kind, request.model, body.encode()), "json")

    def admit(self, *args: Any, **fields: Any) -> str:
        return self.run(self.transitions.admit([self.admission(*args, **fields)]))[0]

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
        """Submitted and assigned."""
        assert self.submit(call_id, **options).code == "new"
        assert self.assign(call_id, engine).code == "assigned"

    def worker(self, engine: str = "e1", model: str = "m") -> FakeWorker:
        return FakeWorker(self.settings, engine, model, server=self.db).up()

    def start(self, call_id: str, worker: FakeWorker, **options: Any) -> Any:
        """Submitted, assigned and claimed."""
        self.queue(call_id, worker.engine, **options)
        return worker.take()

    def cancel(self, call_id: str, reason: str = "enough") -> str:
        return self.run(self.transitions.cancel(call_id, reason))

    def cancel_session(self, session: str, reason: str = "enough") -> int:
        cursor, n = self.run(self.transitions.cancel_session(session, reason))
        assert cursor == "0"
        return n

    def read(self, router: str) -> None:
        """A router takes all new entries in hand."""
        self.db.xreadgroup(ROUTER_GROUP, router, {self.keys.calls: ">"})

    def expired(self) -> Transitions:
        """As if the result TTL of all finished calls had passed."""
        return Transitions(self.keys, self.settings.model_copy(update={"result_ttl_s": 0}))

    def lapse(self, engine: str = "e1") -> None:
        """The lease of an engine ends."""
        self.db.zadd(self.keys.engines, {engine: LONG_AGO})

    def forget(self, call_id: str) -> None:
        """A record expires, with its log."""
        self.db.delete(self.keys.call(call_id), self.keys.events(call_id))

    # -- eyes

    def record(self, call_id: str) -> Fields:
        return _texts(self.db.hgetall(self.keys.call(call_id)))

    def state(self, call_id: str) -> str:
        return self.record(call_id)["state"]

    def result(self, call_id: str) -> dict[str, Any]:
        return codec.decode(self.db.hget(self.keys.call(call_id), "result"))

    def stream(self) -> list[tuple[str, Fields]]:
        return [(codec.text(e), _texts(f)) for e, f in self.db.xrange(self.keys.calls)]

    def entry_of(self, call_id: str) -> tuple[str, Fields]:
        return next((e, f) for e, f in self.stream() if f.get("id") == call_id)

    def news(self, inbox: str) -> list[Fields]:
        return [_texts(f) for _, f in self.db.xrange(self.keys.inbox(inbox))]

    def log(self, call_id: str) -> list[tuple[str, Fields]]:
        return [(codec.text(e), _texts(f)) for e, f in self.db.xrange(self.keys.events(call_id))]

    def dead(self) -> list[Fields]:
        return [_texts(f) for _, f in self.db.xrange(self.keys.dead)]

    def engine(self, engine: str = "e1") -> Fields:
        return _texts(self.db.hgetall(self.keys.engine(engine)))

    def session(self, session: str) -> Fields:
        return _texts(self.db.hgetall(self.keys.session(session)))

    def open_calls(self, session: str) -> set[str]:
        return {codec.text(m) for m in self.db.smembers(self.keys.session_calls(session))}

    def waiting(self, engine: str = "e1") -> list[str]:
        return [codec.text(m) for m in self.db.zrange(self.keys.queue(engine), 0, -1)]

    def running(self, engine: str = "e1") -> list[str]:
        return [codec.text(m) for m in self.db.zrange(self.keys.running(engine), 0, -1)]

    def stat(self, name: str) -> int:
        return codec.number(self.db.hget(self.keys.stats, name))

    def leaks(self) -> list[str]:
        mine = (k for k in self.db.scan_iter() if k.decode().startswith(self.keys.prefix))
        names = (k.decode().removeprefix(self.keys.prefix) for k in mine if self.db.ttl(k) == -1)
        return [n for n in names if not LASTING.fullmatch(n) and not self._open(n)]

    def _open(self, name: str) -> bool:
        return name.startswith("call:") and self.state(name[5:].removesuffix(":events")) in ("PENDING", "RUNNING")


def _texts(fields: Any) -> Fields:
    return Fields({codec.text(k): codec.text(v) for k, v in fields.items()})


def _now(world: World) -> int:
    seconds, _ = world.db.time()
    return int(seconds) * 1000


@pytest.fixture(params=["server", "fakeredis"])
def world(request: pytest.FixtureRequest, settings: Settings) -> Iterator[World]:
    if request.param == "server":
        db = connect(settings)
        yield World(db, settings)
        db.close()
    else:
        fake = World(fakeredis.FakeRedis(server_type="valkey", version=(7, 2)), settings)
        yield fake
        assert not fake.leaks()


# -- submit


def test_submit_makes_a_record_and_pushes_routing_fields_only(world: World) -> None:
    call = world.prepare(
        "c1", "tell me", session="s1", model="m", priority=-3, deadline_ms=1 << 50, stream=True, inbox="box",
        prompt_tokens=7, traceparent="00-ab", on_engine_loss="restart", params={"max_tokens": 4},
    )  # fmt: skip
    assert world.run(world.transitions.submit([call])) == [Submitted("new", RequestState.PENDING)]
    record = world.record("c1")
    entry, fields = world.entry_of("c1")
    assert fields == {"id": "c1", "session": "s1", "model": "m", "prompt_tokens": "7", "ref": "1"}
    assert record["gen"] == entry
    assert codec.decode(world.db.hget(world.keys.call("c1"), "body")) == {"prompt": "tell me", "max_tokens": 4}
    assert abs(int(record["submitted_ms"]) - int(entry.split("-")[0])) < 1000
    expected = {
        "state": "PENDING", "session": "s1", "kind": "generate", "model": "m", "priority": "-3", "prompt_tokens": "7",
        "deadline_ms": str(1 << 50), "stream": "1", "inbox": "box", "traceparent": "00-ab", "digest": call.digest,
        "on_engine_loss": "restart",
        "attempt": "1", "engine": "",
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert record.ints("failures", "events", "level") == (0, 0, 0)
    assert world.open_calls("s1") == {"c1"}
    assert world.session("s1")["arrivals"] == "1"
    assert world.db.zscore(world.keys.deadlines, "c1") == 1 << 50
    assert world.stat("submitted") == 1


def test_a_push_repeated_is_a_duplicate(world: World) -> None:
    call = world.prepare("c1", inbox="box")
    again = world.prepare("c1", inbox="other")
    codes = world.run(world.transitions.submit([call, again, world.prepare("c2")]))
    assert [c.code for c in codes] == ["new", "duplicate", "new"]
    assert [f["id"] for _, f in world.stream()] == ["c1", "c2"]
    assert world.record("c1")["inbox"] == "other", "the producer that came back listens elsewhere"
    assert world.stat("submitted") == 2


@pytest.mark.parametrize("change", [{"prompt": "other"}, {"model": "m2"}, {"kind": "completions"}])
def test_another_call_under_the_same_id_is_a_conflict(world: World, change: dict[str, Any]) -> None:
    world.submit("c1", inbox="box")
    before = world.record("c1")
    assert world.submit("c1", **{"inbox": "thief", **change}).code == "conflict"
    assert world.record("c1") == before
    assert len(world.stream()) == 1


def test_a_repeated_push_says_how_the_call_ended(world: World) -> None:
    worker = world.worker()
    worker.finish(world.start("c1", worker))
    assert world.submit("c1") == Submitted("duplicate", RequestState.COMPLETED)
    assert not world.stream()


# -- admit


def test_admit_moves_the_body_into_the_record(world: World) -> None:
    entry = world.push("c1", stream="1")
    assert world.admit(entry, "c1", stream=True, inbox="box", prompt_tokens=3, on_engine_loss="fail") == "new"
    record = world.record("c1")
    assert (record["stream"], record["inbox"], record["on_engine_loss"]) == ("1", "box", "fail")
    assert (record["json"], record["gen"], record["state"]) == ('{"prompt":"hi"}', entry, "PENDING")
    assert not record["body"]
    assert world.stream(), "the entry stays until the call is assigned"
    assert world.assign("c1").code == "unplaced"
    world.worker()
    assert world.assign("c1").code == "assigned"
    assert not world.stream()


def test_an_entry_admitted_twice_is_one_call(world: World) -> None:
    entry = world.push("c1")
    assert [world.admit(entry, "c1") for _ in range(2)] == ["new", "duplicate"]
    assert world.stream()
    assert world.stat("submitted") == 1


def test_the_same_raw_push_twice_is_one_call(world: World) -> None:
    first, second = world.push("c1"), world.push("c1")
    admissions = [world.admission(first, "c1"), world.admission(second, "c1")]
    assert world.run(world.transitions.admit(admissions)) == ["new", "duplicate"]
    assert [e for e, _ in world.stream()] == [first]


def test_an_entry_that_another_router_took_is_gone(world: World) -> None:
    assert world.admit("5-1", "c1") == "gone"
    assert not world.record("c1")


def test_a_raw_push_under_a_foreign_id_is_a_dead_letter(world: World) -> None:
    world.submit("c1", "mine")
    before = world.record("c1")
    entry = world.push("c1", session="s2")
    assert world.admit(entry, "c1", session="s2", inbox="box") == "conflict"
    assert world.record("c1") == before
    assert [f["ref"] for _, f in world.stream()] == ["1"]
    (letter,) = world.dead()
    assert (letter["id"], letter["error_code"], letter["session"]) == ("c1", "conflict", "s2")
    (news,) = world.news("box")
    assert (news["call"], news["state"], news["error_code"], news["gen"]) == ("c1", "FAILED", "conflict", entry)


# -- reject


def test_a_refused_entry_becomes_a_failed_record(world: World) -> None:
    entry = world.push("c1")
    assert world.reject(entry, "c1", inbox="box") == "failed"
    record = world.record("c1")
    assert (record["state"], record["error_code"], record["error"]) == ("FAILED", "invalid_request", "It is wrong.")
    assert world.news("box")[0]["error_code"] == "invalid_request"
    assert not world.stream()
    assert not world.open_calls("c1")
    assert world.db.ttl(world.keys.call("c1")) > 0


@pytest.mark.parametrize("call_id", ["", "taken"])
def test_a_refused_entry_without_a_free_id_becomes_a_dead_letter(world: World, call_id: str) -> None:
    world.submit("taken")
    before = world.record("taken")
    entry = world.push("x")
    assert world.reject(entry, call_id, inbox="box") == "buried"
    assert world.record("taken") == before
    assert [f["id"] for _, f in world.stream()] == ["taken"]
    (letter,) = world.dead()
    assert (letter["id"], letter["entry"], letter["error"]) == (call_id, entry, "It is wrong.")
    assert world.news("box")[0]["state"] == "FAILED"


def test_an_admitted_call_can_be_refused(world: World) -> None:
    entry = world.push("c1")
    world.admit(entry, "c1")
    assert world.reject(entry, "c1") == "failed"
    assert world.state("c1") == "FAILED"
    assert not world.dead()


def test_a_refusal_does_not_end_a_call_twice(world: World) -> None:
    """The call was cancelled while its entry was on the stream, and then no engine served its model."""
    world.submit("c1", inbox="box")
    entry, _ = world.entry_of("c1")
    world.cancel("c1")
    assert world.reject(entry, "c1", gen=entry, inbox="box") == "stale"
    assert world.state("c1") == "CANCELLED"
    assert [n["state"] for n in world.news("box")] == ["CANCELLED"]
    assert not world.dead()
    assert not world.stream()


def test_an_entry_is_refused_once_and_the_stream_goes_on(world: World) -> None:
    entry = world.push("bad")
    world.submit("good")
    assert [world.reject(entry, "bad") for _ in range(2)] == ["failed", "gone"]
    world.worker()
    assert world.assign("good").code == "assigned"


# -- assign


def test_assign_puts_the_call_into_the_queue(world: World) -> None:
    worker = world.worker()
    world.submit("c1")
    assert world.assign("c1", hit=False) == Placed("assigned", "e1")
    assert world.waiting() == ["c1"]
    assert not world.stream()
    record = world.record("c1")
    assert (record["engine"], record.ints("level", "inherited")) == ("e1", (0, 0))
    assert record["why"] == "a test says so"
    assert world.engine().ints("queued_tokens", "served") == (10, 1)
    assert world.stat("affinity_misses") == 1
    assert world.db.llen(world.keys.bell(worker.engine)) == 1


def test_one_ring_is_enough(world: World) -> None:
    world.worker()
    for i in range(3):
        world.queue(f"c{i}")
    assert world.db.llen(world.keys.bell("e1")) == 1


def test_assign_counts_hits(world: World) -> None:
    world.worker()
    for i, hit in enumerate((True, True, False, None)):
        world.submit(f"c{i}")
        world.assign(f"c{i}", hit=hit)
    assert (world.stat("affinity_hits"), world.stat("affinity_misses")) == (2, 1)


def test_queue_order_is_class_then_level_then_arrival(world: World) -> None:
    world.worker()
    world.run(world.transitions.session("charge", "old", "", 5_000_000, 0))
    world.run(world.transitions.session("charge", "middle", "", 2_000, 0))
    for call_id, session, priority in [
        ("lowest", "new", 127), ("late-class", "new", 1), ("old-urgent", "old", -1), ("old-1", "old", 0),
        ("middle-1", "middle", 0), ("new-1", "new", 0), ("new-2", "new", 0), ("first", "old", -128),
    ]:  # fmt: skip
        world.submit(call_id, session=session, priority=priority)
        arrival = {"old-1": 1000, "new-1": 2000, "new-2": 3000}.get(call_id)
        if arrival:
            world.db.hset(world.keys.call(call_id), "submitted_ms", arrival)
        world.assign(call_id)
    assert world.waiting() == [
        "first", "old-urgent", "new-1", "new-2", "middle-1", "old-1", "late-class", "lowest",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("service", "level"),
    [(0, 0), (999, 0), (1000, 1), (3_999, 1), (4_000, 2), (255_999, 4), (999_999, 5), (1_000_000, 6), (10**12, 6)],
)
def test_the_level_is_the_bin_of_the_sessions_service(world: World, service: int, level: int) -> None:
    world.worker()
    if service:
        world.run(world.transitions.session("charge", "s", "", service, 0))
    world.queue("c1", session="s")
    assert world.record("c1").ints("level", "inherited") == (level, service)


def test_scores_are_exact_at_both_ends(world: World) -> None:
    """8 + 4 + 41 bits fill a double: one millisecond must count also in the last class and level."""
    world.worker()
    world.run(world.transitions.session("charge", "s", "", 10**9, 0))
    for call_id, arrival in (("b", 2_000_000_000_001), ("a", 2_000_000_000_002), ("c", 2_000_000_000_000)):
        world.submit(call_id, session="s", priority=127)
        world.db.hset(world.keys.call(call_id), "submitted_ms", arrival)
        world.assign(call_id)
    assert world.waiting() == ["c", "b", "a"]


def test_two_routers_bind_a_session_to_one_engine(world: World) -> None:
    world.worker("e1")
    world.worker("e2")
    for call_id in ("c1", "c2"):
        world.submit(call_id, session="s")
    assert world.assign("c1", "e1", bind=True, seen="") == Placed("assigned", "e1")
    assert world.assign("c2", "e2", bind=True, seen="") == Placed("assigned", "e1")
    assert world.waiting("e1") == ["c1", "c2"]
    assert "another router" in world.record("c2")["why"]
    assert "another router" not in world.record("c1")["why"]


def test_a_router_that_saw_the_binding_may_change_it(world: World) -> None:
    world.worker("e1")
    world.worker("e2")
    for call_id in ("c1", "c2"):
        world.submit(call_id, session="s")
    world.assign("c1", "e1", bind=True)
    assert world.assign("c2", "e2", bind=True, seen="e1").engine == "e2"
    assert world.session("s")["engine"] == "e2"


def test_a_binding_to_an_engine_that_takes_no_calls_is_void(world: World) -> None:
    world.worker("e1")
    world.worker("e2")
    for call_id in ("c1", "c2"):
        world.submit(call_id, session="s")
    world.assign("c1", "e1", bind=True)
    world.run(world.transitions.drain("e1"))
    assert world.assign("c2", "e2", bind=True, seen="").engine == "e2"


def test_no_binding_without_the_wish(world: World) -> None:
    world.worker()
    world.queue("c1", session="s")
    assert "engine" not in world.session("s")


def test_a_call_without_an_engine_is_parked(world: World) -> None:
    world.submit("c1", model="m")
    assert world.assign("c1", "") == Placed("parked", "")
    assert world.db.zrange(world.keys.parked("m"), 0, -1) == [b"c1"]
    assert not world.stream()
    assert world.state("c1") == "PENDING"


def test_a_call_that_another_router_parked_and_one_placed_is_parked_no_more(world: World) -> None:
    world.worker()
    for call_id in ("placed", "late"):
        world.submit(call_id, model="m", deadline_ms=1 << 50)
        in_hand = world.placement(call_id)
        assert world.assign(call_id, "").code == "parked"
        if call_id == "late":
            world.db.hset(world.keys.call(call_id), "deadline_ms", LONG_AGO)
        (placed,) = world.run(world.transitions.assign([in_hand]))
        assert placed.code == ("expired" if call_id == "late" else "assigned")
        assert not world.db.zcard(world.keys.parked("m"))


@pytest.mark.parametrize("state", ["STARTING", "DRAINING", "DEAD", "none"])
def test_an_engine_that_takes_no_calls_gets_none(world: World, state: str) -> None:
    if state != "none":
        world.worker()
        world.db.hset(world.keys.engine("e1"), "state", state)
    world.submit("c1")
    assert world.assign("c1") == Placed("unplaced", "e1")
    assert world.stream(), "the entry stays, to be placed once more"
    assert world.record("c1")["engine"] == ""


def test_an_entry_without_a_record_is_missing(world: World) -> None:
    world.worker()
    world.db.xadd(world.keys.calls, {"id": "c1", "ref": "1"})
    assert world.assign("c1") == Placed("missing", "")
    assert world.stream()


def test_a_re_delivered_entry_is_stale(world: World) -> None:
    world.worker("e1")
    world.worker("e2")
    world.submit("c1")
    placement = world.placement("c1", "e1")
    again = placement._replace(engine="e2")
    assert world.run(world.transitions.assign([placement, again])) == [Placed("assigned", "e1"), Placed("stale", "e1")]
    assert (world.waiting("e1"), world.waiting("e2")) == (["c1"], [])
    assert world.engine("e2").ints("queued_tokens") == (0,)


def test_an_entry_of_an_older_call_with_the_same_id_is_stale(world: World) -> None:
    world.worker()
    world.submit("c1")
    old = world.placement("c1")
    world.forget("c1")
    world.submit("c1")
    assert world.run(world.transitions.assign([old])) == [Placed("stale", "")]
    assert not world.waiting()
    assert world.assign("c1").code == "assigned"


def test_a_passed_deadline_ends_the_call_on_arrival(world: World) -> None:
    world.worker()
    world.submit("c1", deadline_ms=LONG_AGO, inbox="box")
    assert world.assign("c1").code == "expired"
    assert world.record("c1")["error_code"] == "deadline_exceeded"
    assert world.news("box")[0]["error_code"] == "deadline_exceeded"
    assert not world.db.zcard(world.keys.deadlines)
    assert not world.stream()


def test_a_batch_is_assigned_call_by_call(world: World) -> None:
    world.worker()
    for call_id in ("a", "b", "c"):
        world.submit(call_id)
    world.cancel("b")
    placements = [world.placement("a"), world.placement("b"), world.placement("c", "e9")]
    assert [p.code for p in world.run(world.transitions.assign(placements))] == ["assigned", "stale", "unplaced"]


# -- claim


def test_claim_hands_over_all_that_a_worker_needs(world: World) -> None:
    worker = world.worker()
    world.queue(
        "c1", prompt="tell", session="s", priority=4, stream=True, inbox="box", prompt_tokens=9, traceparent="00-ab"
    )
    call = worker.take()
    assert (call.fence.call_id, call.fence.attempt, call.session, call.kind) == ("c1", 1, "s", "generate")
    assert (call.stream, call.inbox, call.priority, call.level, call.events) == (True, "box", 4, 0, 0)
    assert (call.traceparent, call.prompt_tokens, call.body_field, call.cancelled) == ("00-ab", 9, "body", False)
    assert codec.decode(call.body) == {"prompt": "tell"}
    assert call.fence.gen == world.record("c1")["gen"]
    assert world.state("c1") == "RUNNING"
    assert (world.waiting(), world.running()) == ([], ["c1"])
    assert world.engine().ints("queued_tokens", "running_tokens") == (0, 9)


def test_a_raw_json_body_is_handed_over_as_json(world: World) -> None:
    worker = world.worker()
    entry = world.push("c1")
    world.admit(entry, "c1")
    world.assign("c1")
    call = worker.take()
    assert (call.body_field, call.body) == ("json", b'{"prompt":"hi"}')


def test_claim_takes_at_most_so_many_in_order(world: World) -> None:
    worker = world.worker()
    for i in range(5):
        world.queue(f"c{i}", priority=i)
    assert [c.fence.call_id for c in worker.claim(2) or ()] == ["c0", "c1"]
    assert world.waiting() == ["c2", "c3", "c4"]
    assert [c.fence.call_id for c in worker.claim(9) or ()] == ["c2", "c3", "c4"]
    assert worker.claim(9) == []


def test_the_same_claim_number_gives_the_same_calls(world: World) -> None:
    worker = world.worker()
    for i in range(3):
        world.queue(f"c{i}")
    first = worker.claim(2, claim_no=7)
    assert worker.claim(2, claim_no=7) == first
    assert world.waiting() == ["c2"]
    assert first is not None
    worker.finish(first[0])
    assert worker.claim(2, claim_no=7) == first[1:], "what ended meanwhile is not handed over again"
    assert [c.fence.call_id for c in worker.claim(2, claim_no=8) or ()] == ["c2"]


def test_a_claim_that_got_nothing_may_get_something_under_its_number(world: World) -> None:
    worker = world.worker()
    assert worker.claim(claim_no=1) == []
    world.queue("c1")
    assert len(worker.claim(claim_no=1) or ()) == 1


def test_only_the_incarnation_that_registered_may_claim(world: World) -> None:
    world.worker()
    world.queue("c1")
    assert FakeWorker(world.settings, server=world.db).claim() is None
    assert FakeWorker(world.settings, "unknown", server=world.db).claim() is None
    assert world.waiting() == ["c1"]


def test_a_dead_engine_may_not_claim(world: World) -> None:
    worker = world.worker()
    world.queue("c1")
    world.lapse()
    world.run(world.transitions.reap())
    assert worker.claim() is None


def test_claim_ends_a_call_whose_deadline_passed(world: World) -> None:
    worker = world.worker()
    world.queue("c1", inbox="box")
    world.db.hset(world.keys.call("c1"), "deadline_ms", LONG_AGO)
    world.queue("c2")
    assert [c.fence.call_id for c in worker.claim() or ()] == ["c2"]
    assert world.record("c1")["error_code"] == "deadline_exceeded"
    assert world.news("box")
    assert world.engine().ints("queued_tokens") == (0,)


def test_claim_tells_the_time_left(world: World) -> None:
    """Not the deadline: no clock but that of Redis is to be compared with it."""
    worker = world.worker()
    seconds, micros = world.db.time()
    world.queue("c1", deadline_ms=seconds * 1000 + micros // 1000 + 60_000)
    world.queue("c2")
    left = {c.fence.call_id: c.left_ms for c in worker.claim() or ()}
    assert left["c2"] is None
    assert 50_000 < (left["c1"] or 0) <= 60_000


def test_a_flag_set_before_a_replayed_claim_is_handed_over(world: World) -> None:
    worker = world.worker()
    world.queue("c1")
    worker.claim(claim_no=1)
    world.cancel("c1")
    assert [c.cancelled for c in worker.claim(claim_no=1) or ()] == [True]


# -- reconcile


def test_a_worker_learns_how_its_calls_differ_from_those_of_redis(world: World) -> None:
    worker, other = world.worker("e1"), world.worker("e2")
    mine, ended, moved, again = (world.start(f"c{i}", worker) for i in range(4))
    worker.finish(ended)
    worker.release(moved, fault=False)
    world.assign("c2", "e2")
    theirs = other.take()
    worker.release(again, fault=False)
    world.assign("c3", "e1")
    anew = worker.take()

    def look(worker: FakeWorker, *held: Claimed) -> Differences | None:
        return world.run(world.transitions.reconcile(worker.engine, worker.incarnation, [c.fence for c in held]))

    assert look(worker, mine, anew) == look(other, theirs) == ([], [])
    assert look(worker, mine, ended, moved, again) == ([c.fence for c in (ended, moved, again)], [anew.fence])
    assert look(other) == ([], [theirs.fence])
    world.forget("c0")
    assert look(worker, mine, anew) == ([mine.fence], [])
    worker.incarnation = "another"
    assert look(worker, mine) is None


# -- publish


def test_a_piece_goes_to_the_log_and_to_the_inbox(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True, inbox="box")
    assert worker.publish(call, "a", "b") == ["ok", "ok"]
    log, news = world.log("c1"), world.news("box")
    assert [f for _, f in log] == [
        {"n": "0", "text": "a", "token_ids": "0"},
        {"n": "1", "text": "b", "token_ids": "1"},
    ]
    assert [n["eid"] for n in news] == [e for e, _ in log]
    assert [(n["call"], n["gen"], n["text"]) for n in news] == [("c1", call.fence.gen, t) for t in "ab"]
    assert world.record("c1")["events"] == "2"
    assert world.db.ttl(world.keys.inbox("box")) > 0


def test_a_chunk_stands_alone_and_its_replay_stays_in_the_log(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True, inbox="box")
    event = Event(call.fence, 0, "", (), '{"a":1}', "xyz")
    assert world.run(world.transitions.publish("e1", [event])) == ["ok"]
    assert world.log("c1")[0][1] == {"n": "0", "chunk": '{"a":1}', "replay": "xyz"}
    assert "replay" not in world.news("box")[0]


def test_without_an_inbox_the_log_is_enough(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True)
    assert worker.publish(call, "a") == ["ok"]
    assert len(world.log("c1")) == 1
    assert not world.db.keys(world.keys.prefix.replace("[", r"\[") + "inbox:*")


def test_a_repeated_publish_is_seen(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True, inbox="box")
    worker.publish(call, "a", "b")
    assert worker.publish(call, "a", "b", "c") == ["seen", "seen", "ok"]
    assert [f["text"] for _, f in world.log("c1")] == ["a", "b", "c"]
    assert len(world.news("box")) == 3


def test_a_publish_under_an_old_fence_changes_nothing(world: World) -> None:
    worker, other = world.worker("e1"), world.worker("e2")
    old = world.start("c1", worker, stream=True)
    worker.publish(old, "a")
    worker.release(old, fault=False)
    assert worker.publish(old, "late", first=1) == ["stale"], "while it waits"
    world.assign("c1", "e2")
    new = other.take()
    assert (new.events, new.fence.attempt) == (1, 2)
    assert worker.publish(old, "late", first=1) == ["stale"], "while it runs elsewhere"
    assert other.publish(new, "b") == ["ok"]
    other.finish(new)
    assert other.publish(new, "c", first=2) == ["stale"], "after its end"
    assert [f.get("text") for _, f in world.log("c1")] == ["a", "b", None]


def test_events_behind_a_gap_are_not_written(world: World) -> None:
    """Redis lost one that it had acknowledged; the worker is to begin again behind what is left."""
    worker = world.worker()
    call = world.start("c1", worker, stream=True, inbox="box")
    worker.publish(call, "a")
    assert worker.publish(call, "c", "d", first=2) == ["gap", "gap"]
    assert [f["text"] for _, f in world.log("c1")] == ["a"]
    assert world.record("c1").ints("events") == (1,)
    assert worker.publish(call, "b", first=1) == ["ok"]


# -- finish


def test_an_end_behind_a_gap_changes_nothing(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True)
    worker.publish(call, "a")
    before = world.record("c1")
    assert worker.finish(call, events=2) == "gap"
    assert (world.record("c1"), world.running()) == (before, ["c1"])
    assert worker.finish(call, state=RequestState.CANCELLED, events=2) == "done", "nobody misses the rest of it"
    whole = world.start("c2", worker, stream=True)
    worker.publish(whole, "a")
    assert worker.finish(whole, events=1) == "done"


def test_finish_ends_a_call(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, session="s", stream=True, inbox="box")
    worker.publish(call, "a")
    assert worker.finish(call, "done", prompt_tokens=100, completion_tokens=7, cached_tokens=60) == "done"
    record = world.record("c1")
    assert record["state"] == "COMPLETED"
    assert (record["prompt_tokens"], record["completion_tokens"], record["cached_tokens"]) == ("100", "7", "60")
    assert not record["body"]
    assert world.result("c1")["text"] == "done"
    assert not world.running()
    assert world.engine().ints("running_tokens") == (0,)
    assert not world.open_calls("s")
    assert world.db.lrange(world.keys.session_recent("s"), 0, -1) == [b"c1"]
    assert world.stat("completed") == 1
    assert (world.stat("prompt_tokens"), world.stat("completion_tokens"), world.stat("cached_tokens")) == (100, 7, 60)


def test_the_end_is_told_once_with_the_result(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, session="s", stream=True, inbox="box")
    worker.publish(call, "a")
    assert worker.finish(call) == "done"
    assert worker.finish(call, "other") == "again"
    end = world.news("box")[-1]
    assert len([n for n in world.news("box") if "state" in n]) == 1
    assert (end["call"], end["state"], end["n"], end["session"], end["engine"]) == ("c1", "COMPLETED", "1", "s", "e1")
    assert (end["attempt"], end["gen"]) == ("1", call.fence.gen)
    assert end["big"] in ("", "0")
    assert world.result("c1")["text"] == "done"
    last = world.log("c1")[-1][1]
    assert (last["n"], last["state"], last["error_code"], last["error"]) == ("1", "COMPLETED", "", "")


def test_a_big_result_stays_in_the_record(world: World) -> None:
    worker = world.worker()
    worker.finish(world.start("c1", worker, inbox="box"), "x" * 70_000)
    (end,) = world.news("box")
    assert (end["big"], end["result"]) == ("1", "")
    assert len(world.result("c1")["text"]) == 70_000


def test_all_that_a_finished_call_leaves_expires(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, session="s", stream=True, inbox="box", deadline_ms=1 << 50)
    worker.publish(call, "a")
    worker.finish(call, resident_tokens=5)
    k = world.keys
    for key in (k.call("c1"), k.events("c1"), k.inbox("box"), k.session("s"), k.session_recent("s"), k.affinity("s")):
        assert 0 < world.db.ttl(key) <= 3600, key
    assert not world.db.exists(k.deadlines, k.session_calls("s"), k.running("e1"), k.queue("e1"))


@pytest.mark.parametrize("state", [RequestState.COMPLETED, RequestState.FAILED])
def test_an_acknowledged_cancel_beats_the_finish(world: World, state: RequestState) -> None:
    worker = world.worker()
    call = world.start("c1", worker, inbox="box")
    assert world.cancel("c1", "no longer needed") == "cancelling"
    assert worker.finish(call, "almost", state, error_code="engine_error", error="Broken.") == "done"
    record = world.record("c1")
    assert (record["state"], record["error_code"], record["error"]) == ("CANCELLED", "", "no longer needed")
    assert world.result("c1")["text"] == "almost"
    assert world.news("box")[-1]["state"] == "CANCELLED"


def test_a_failed_call_keeps_its_body(world: World) -> None:
    worker = world.worker()
    assert worker.fail(world.start("c1", worker)) == "done"
    record = world.record("c1")
    assert (record["state"], record["error_code"], record["error"]) == ("FAILED", "engine_error", "The engine broke.")
    assert "body" in record


def test_a_finish_under_an_old_fence_changes_nothing(world: World) -> None:
    """Also on the very engine that has it again."""
    worker = world.worker()
    old = world.start("c1", worker)
    worker.release(old, fault=False)
    before = world.record("c1")
    assert worker.finish(old) == "stale"
    world.assign("c1")
    assert worker.finish(old) == "stale"
    new = worker.take()
    assert worker.finish(old) == "stale"
    assert before["state"] == "PENDING"
    assert world.running() == ["c1"]
    assert worker.finish(new) == "done"


def test_after_reassignment_the_old_engine_can_change_nothing(world: World) -> None:
    old_worker, new_worker = world.worker("e1"), world.worker("e2")
    old = world.start("c1", old_worker, stream=True, inbox="box")
    world.lapse("e1")
    world.run(world.transitions.reap())
    world.assign("c1", "e2")
    new = new_worker.take()
    before = (world.record("c1"), world.news("box"), world.log("c1"), world.session("c1"), world.engine("e1"))
    assert old_worker.publish(old, "late") == ["stale"]
    assert old_worker.finish(old) == "stale"
    assert old_worker.release(old, fault=True) == ["stale"]
    assert not old_worker.beat()
    forged = old_worker.finish(old, fence=new.fence)
    assert forged == "stale", "the right fence from the wrong engine is no better"
    after = (world.record("c1"), world.news("box"), world.log("c1"), world.session("c1"), world.engine("e1"))
    assert after == before
    assert new_worker.finish(new) == "done"


def test_service_is_the_longest_path_not_the_sum(world: World) -> None:
    worker = world.worker()
    for call_id in ("a", "b"):
        world.queue(call_id, session="s")
    a, b = worker.take(), worker.take()
    worker.finish(a, prompt_tokens=100, cached_tokens=40, completion_tokens=20)  # 60 + 2 x 20
    assert world.session("s")["service"] == "100"
    worker.finish(b, prompt_tokens=30, completion_tokens=10)  # 50, beside a: the critical path stays
    assert world.session("s")["service"] == "100"
    worker.finish(
        world.start("c", worker, session="s"), prompt_tokens=10, completion_tokens=10
    )  # behind both: 100 + 30
    assert world.session("s")["service"] == "130"
    assert world.record("c")["inherited"] == "100"


def test_finish_writes_where_the_cache_is(world: World) -> None:
    worker = world.worker()
    worker.finish(world.start("c1", worker, session="s"), resident_tokens=50)
    tokens, _, used = codec.text(world.db.hget(world.keys.affinity("s"), "e1")).partition(":")
    assert (tokens, int(used)) == ("50", int(world.record("c1")["finished_ms"]))
    worker.finish(world.start("c2", worker, session="s"), resident_tokens=0)
    assert world.db.hget(world.keys.affinity("s"), "e1").startswith(b"50:"), "0 = the engine does not know"
    worker.finish(world.start("alone", worker), resident_tokens=50)
    assert not world.db.exists(world.keys.affinity("alone")), "a session of one call needs no affinity"


def test_finishes_of_a_batch_are_judged_one_by_one(world: World) -> None:
    worker = world.worker()
    for call_id in ("a", "b"):
        world.queue(call_id)
    a, b = worker.take(), worker.take()
    worker.release(b, fault=False)
    ends = [Finish(c.fence, RequestState.COMPLETED, "", "", b"\x80", 1, 1, 0, 0) for c in (a, b, a)]
    assert world.run(world.transitions.finish("e1", ends)) == ["done", "stale", "again"]


def test_the_engines_own_count_of_tokens_replaces_the_estimate(world: World) -> None:
    worker = world.worker()
    for call_id, tokens in (("c1", 12), ("c2", 0)):
        worker.finish(world.start(call_id, worker, inbox="box"), prompt_tokens=tokens)
        assert world.record(call_id).ints("prompt_tokens") == (tokens,)
        assert world.news("box")[-1].ints("prompt_tokens") == (tokens,)
    assert world.engine().ints("queued_tokens", "running_tokens") == (0, 0)


# -- release


def test_a_graceful_give_back_does_not_count(world: World) -> None:
    worker = world.worker()
    world.queue("c1", prompt_tokens=9)
    for n in range(1, 6):
        call = worker.take()
        assert call.fence.attempt == n
        assert worker.release(call, fault=False) == ["released"]
        assert (world.record("c1").ints("failures"), world.state("c1"), world.running()) == ((0,), "PENDING", [])
        entry, fields = world.entry_of("c1")
        assert fields == {"id": "c1", "gen": call.fence.gen, "session": "c1", "model": "", "prompt_tokens": "9"}
        assert entry != call.fence.gen
        assert world.assign("c1").code == "assigned"
    assert world.engine().ints("running_tokens") == (0,)
    assert world.stat("requeued") == 5


def test_faults_count_up_to_the_last_attempt(world: World) -> None:
    worker = world.worker()
    world.queue("c1", prompt="tell me", session="s", inbox="box", model="m")
    for _ in range(world.settings.max_attempts - 1):
        assert worker.release(worker.take(), fault=True) == ["released"]
        assert world.state("c1") == "PENDING"
        world.assign("c1")
    assert worker.release(worker.take(), fault=True, error="Out of memory.") == ["released"]
    record = world.record("c1")
    assert (record["state"], record["error_code"], record["error"]) == ("FAILED", "engine_error", "Out of memory.")
    assert record.ints("failures", "attempt") == (3, 3)
    (letter,) = world.dead()
    assert (letter["id"], letter["error_code"], letter["session"], letter["model"]) == ("c1", "engine_error", "s", "m")
    assert letter["attempts"] == "3"
    (_, raw) = world.db.xrange(world.keys.dead)[0]
    assert codec.decode(raw[b"body"]) == {"prompt": "tell me"}
    assert [n["state"] for n in world.news("box")] == ["FAILED"]
    assert not world.stream()


def test_a_raw_json_body_goes_into_its_dead_letter(world: World) -> None:
    worker = world.worker()
    world.admit(world.push("c1"), "c1")
    for _ in range(world.settings.max_attempts):
        world.assign("c1")
        worker.release(worker.take(), fault=True)
    assert world.dead()[0]["json"] == '{"prompt":"hi"}'


def test_release_under_an_old_fence_changes_nothing(world: World) -> None:
    worker = world.worker()
    old = world.start("c1", worker)
    assert worker.release(old, old, fault=True) == ["released", "stale"]
    world.assign("c1")
    assert worker.release(old, fault=True) == ["stale"]
    assert world.waiting() == ["c1"]


def test_a_flagged_call_given_back_is_cancelled(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, inbox="box")
    world.cancel("c1", "enough")
    assert worker.release(call, fault=False) == ["released"]
    assert (world.state("c1"), world.record("c1")["error"]) == ("CANCELLED", "enough")
    assert world.news("box")[0]["state"] == "CANCELLED"
    assert not world.stream()


def test_a_second_assignment_leaves_nothing_of_the_first(world: World) -> None:
    worker = world.worker()
    world.run(world.transitions.session("charge", "s", "", 5_000, 0))
    call = world.start("c1", worker, session="s")
    assert world.record("c1").ints("level", "inherited") == (2, 5000)
    worker.release(call, fault=False)
    world.db.delete(world.keys.session("s"))  # expired meanwhile
    world.assign("c1")
    assert world.record("c1").ints("level", "inherited") == (0, 0)
    assert worker.take().level == 0


# -- cancel


def test_a_waiting_call_is_cancelled_at_once(world: World) -> None:
    worker = world.worker()
    world.queue("c1", inbox="box", session="s")
    assert world.cancel("c1", "enough") == "cancelled"
    assert (world.state("c1"), world.record("c1")["error"]) == ("CANCELLED", "enough")
    assert (world.waiting(), world.engine().ints("queued_tokens"), world.open_calls("s")) == ([], (0,), set())
    assert world.news("box")[0]["state"] == "CANCELLED"
    assert not world.record("c1")["body"]
    assert worker.claim() == []


def test_a_call_on_the_stream_is_cancelled_at_once(world: World) -> None:
    world.worker()
    world.submit("c1")
    assert world.cancel("c1") == "cancelled"
    assert world.assign("c1").code == "stale"
    assert not world.stream()
    assert not world.waiting()


@pytest.mark.parametrize("how", ["cancel", "session", "deadline", "transition"])
def test_the_entry_of_a_call_that_ended_on_the_stream_goes_with_its_record(world: World, how: str) -> None:
    """Left there it would be admitted once more: its router died, and none ran until the record had expired."""
    entry = world.push("c1", session="s")
    world.read("a router that dies")
    assert world.admit(entry, "c1", session="s", deadline_ms=1 << 50) == "new"
    if how == "cancel":
        assert world.cancel("c1") == "cancelled"
    elif how == "session":
        assert world.cancel_session("s") == 1
    elif how == "deadline":
        world.db.zadd(world.keys.deadlines, {"c1": LONG_AGO})
        assert world.run(world.transitions.expire()) == 1
    else:
        assert world.run(world.transitions.transition("c1", RequestState.CANCELLED)) == (True, "PENDING")
    other = world.push("c2")
    world.forget("c1")
    assert world.run(world.expired().retain()).entries == 1
    assert world.admit(entry, "c1", session="s") == "gone"
    assert [e for e, _ in world.stream()] == [other]
    assert world.db.xpending(world.keys.calls, ROUTER_GROUP)["pending"] == 0


def test_the_end_of_a_hand_made_call_takes_nobodys_entry(world: World) -> None:
    world.run(world.transitions.transition("mine", RequestState.PENDING, "s", ""))
    (born_ms,) = world.record("mine").ints("submitted_ms")
    assert world.db.xadd(world.keys.calls, {"id": "c1"}, id=f"{born_ms}-0")
    world.cancel("mine")
    world.run(world.expired().retain())
    assert world.entry_of("c1")


def test_a_parked_call_is_cancelled_at_once(world: World) -> None:
    world.submit("c1", model="m")
    world.assign("c1", "")
    assert world.cancel("c1") == "cancelled"
    assert not world.db.zcard(world.keys.parked("m"))


def test_a_running_call_is_flagged_and_its_worker_told_once(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker)
    assert [world.cancel("c1"), world.cancel("c1", "again")] == ["cancelling", "cancelling"]
    assert worker.orders() == [{"op": "cancel", "id": "c1", "gen": call.fence.gen, "attempt": "1"}]
    assert world.state("c1") == "RUNNING"
    assert world.record("c1")["cancel_reason"] == "enough"


def test_a_cancel_may_be_repeated_after_a_lost_reply(world: World) -> None:
    """Its caller must not hear that it came too late."""
    world.submit("c1")
    assert [world.cancel("c1"), world.cancel("c1")] == ["cancelled", "cancelled"]
    worker = world.worker()
    call = world.start("c2", worker)
    assert world.cancel("c2") == "cancelling"
    worker.finish(call)
    assert world.cancel("c2") == "cancelled"


def test_whoever_listens_is_told_while_the_call_is_open(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, inbox="first")
    assert world.run(world.transitions.listen("c1", "second")) == "RUNNING"
    worker.finish(call)
    assert [len(world.news(box)) for box in ("first", "second")] == [0, 1]
    assert world.run(world.transitions.listen("c1", "third")) == "COMPLETED"
    assert world.record("c1")["inbox"] == "second"
    assert world.run(world.transitions.listen("gone", "third")) == ""
    assert not world.db.exists(world.keys.call("gone")), "nothing of it would ever expire"


def test_too_late_to_cancel(world: World) -> None:
    worker = world.worker()
    worker.finish(world.start("c1", worker))
    assert world.cancel("c1") == "finished"
    assert world.state("c1") == "COMPLETED"


def test_a_call_that_ends_by_its_deadline_can_no_longer_be_cancelled(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, deadline_ms=1 << 50)
    world.db.zadd(world.keys.deadlines, {"c1": LONG_AGO})
    world.run(world.transitions.expire())
    assert world.cancel("c1") == "finished"
    worker.finish(call)
    assert world.record("c1")["error_code"] == "deadline_exceeded"


def test_a_cancel_that_came_before_the_deadline_holds(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, deadline_ms=1 << 50)
    assert world.cancel("c1") == "cancelling"
    world.db.zadd(world.keys.deadlines, {"c1": LONG_AGO})
    world.run(world.transitions.expire())
    assert len(worker.orders()) == 1
    worker.finish(call)
    assert world.state("c1") == "CANCELLED"


def test_nothing_to_cancel(world: World) -> None:
    assert world.cancel("c1") == "unknown"
    assert not world.record("c1")


def test_a_cancel_noted_before_the_entry_is_read_ends_it_on_arrival(world: World) -> None:
    world.worker()
    entry = world.push("c1")
    assert world.cancel("c1", "too slow") == "noted"
    assert 0 < world.db.ttl(world.keys.call("c1")) <= 3600, "a note without a call expires"
    assert world.admit(entry, "c1", inbox="box") == "new"
    assert world.assign("c1").code == "cancelled"
    assert (world.state("c1"), world.record("c1")["error"]) == ("CANCELLED", "too slow")
    assert world.news("box")[0]["state"] == "CANCELLED"
    assert not world.stream()


def test_a_noted_cancel_does_not_hit_a_later_call(world: World) -> None:
    world.worker()
    world.push("other")
    assert world.cancel("c1") == "noted"
    assert world.submit("c1").code == "new"
    assert world.db.ttl(world.keys.call("c1")) == -1, "an open call never expires"
    assert world.assign("c1").code == "assigned"


# -- cancel_session


def test_a_session_is_cancelled_in_all_its_states(world: World) -> None:
    worker, other = world.worker("e1"), world.worker("e2")
    running = world.start("running", worker, session="s")
    elsewhere = world.start("elsewhere", other, session="s")
    flagged = world.start("flagged", worker, session="s")
    worker.finish(world.start("finished", worker, session="s"))
    world.queue("queued", session="s")
    world.queue("foreign", session="t")
    world.submit("parked", session="s")
    world.assign("parked", "")
    world.submit("pushed", session="s", inbox="box")
    world.cancel("flagged")
    worker.orders()
    assert world.cancel_session("s", "the user left") == 5
    for call_id in ("queued", "parked", "pushed"):
        assert (world.state(call_id), world.record(call_id)["error"]) == ("CANCELLED", "the user left")
    assert [o["id"] for w in (worker, other) for o in w.orders()] == ["running", "elsewhere"]
    for call, w in ((running, worker), (elsewhere, other), (flagged, worker)):
        assert w.finish(call) == "done"
        assert world.state(call.fence.call_id) == "CANCELLED"
    assert (world.state("finished"), world.state("foreign")) == ("COMPLETED", "PENDING")
    assert not world.open_calls("s")
    assert world.waiting() == ["foreign"]


def test_a_sessions_raw_entries_end_on_arrival(world: World) -> None:
    world.worker()
    entry, foreign = world.push("c1", session="s"), world.push("c2", session="t")
    assert world.cancel_session("s", "the user left") == 0
    for e, call_id, session in ((entry, "c1", "s"), (foreign, "c2", "t")):
        world.admit(e, call_id, session=session)
    assert world.assign("c1").code == "cancelled"
    assert (world.state("c1"), world.record("c1")["error"]) == ("CANCELLED", "the user left")
    assert world.assign("c2").code == "assigned"


def test_a_cancelled_session_can_be_used_again(world: World) -> None:
    worker = world.worker()
    world.push("other")
    world.queue("c1", session="s")
    assert world.cancel_session("s") == 1
    call = world.start("c2", worker, session="s")
    worker.release(call, fault=False)
    assert world.assign("c2").code == "assigned", "also when it comes by the stream a second time"
    entry = world.push("c3", session="s")
    world.admit(entry, "c3", session="s")
    assert world.assign("c3").code == "assigned"


def test_a_large_session_is_cancelled_in_rounds(world: World) -> None:
    ids = [f"c{i}" for i in range(600)]
    world.run(world.transitions.submit([world.prepare(i, session="s") for i in ids]))
    cursor, total, rounds = "0", 0, 0
    while True:
        cursor, n = world.run(world.transitions.cancel_session("s", "enough", cursor))
        total, rounds = total + n, rounds + 1
        if cursor == "0":
            break
    assert total == 600
    assert {world.state(i) for i in ids} == {"CANCELLED"}
    assert rounds > 1


def test_cancelling_an_unknown_session_leaves_no_trace(world: World) -> None:
    assert world.cancel_session("nobody") == 0
    assert not world.session("nobody")


# -- register


def test_register_writes_what_the_worker_says(world: World) -> None:
    worker = FakeWorker(world.settings, server=world.db, max_num_seqs=3)
    assert worker.register() == (True, "0-0", 0, "", "")
    engine = world.engine()
    assert (engine["state"], engine["model"], engine["max_num_seqs"]) == ("STARTING", "m", "3")
    assert engine["incarnation"] == worker.incarnation
    (view,) = world.run(world.transitions.look()).engines
    assert (view.id, view.state, view.model, view.max_num_seqs) == ("e1", "STARTING", "m", 3)


def test_an_engine_that_starts_again_keeps_its_model_until_it_says_another(world: World) -> None:
    FakeWorker(world.settings, server=world.db).register()
    world.lapse()
    assert FakeWorker(world.settings, server=world.db, model="").register().ok
    assert world.run(world.transitions.look()).engines[0].model == "m", "calls of its model must wait, not fail"
    world.lapse()
    assert FakeWorker(world.settings, server=world.db, model="other").register().ok
    assert world.run(world.transitions.look()).engines[0].model == "other"


def test_an_engine_id_is_taken_while_its_lease_holds(world: World) -> None:
    first, second = world.worker(), FakeWorker(world.settings, server=world.db)
    reply = second.register()
    assert (reply.ok, reply.node, reply.pid) == (False, "here", "1")
    assert reply.heartbeat_ms == world.db.zscore(world.keys.engines, "e1")
    assert world.engine()["incarnation"] == first.incarnation
    assert first.register().ok, "its owner may register again"
    world.lapse()
    assert second.register().ok
    assert not first.beat()


def test_an_engine_id_is_free_once_its_worker_stopped(world: World) -> None:
    world.worker().beat("STOPPED")
    assert world.db.ttl(world.keys.engine("e1")) > 0
    assert FakeWorker(world.settings, server=world.db).register().ok
    assert world.db.ttl(world.keys.engine("e1")) == -1


def test_a_worker_that_comes_back_takes_its_calls_back(world: World) -> None:
    dead = world.worker()
    old = world.start("a-ran", dead)
    cancelled = world.start("cancelled", dead)
    world.queue("b-queued")
    world.cancel("cancelled", "enough")
    world.lapse()
    heir = world.worker()
    assert world.waiting() == ["a-ran", "b-queued"], "each keeps the place of its arrival"
    assert (world.state("cancelled"), world.record("cancelled")["error"]) == ("CANCELLED", "enough")
    assert world.record("a-ran").ints("attempt", "failures") == (2, 0)
    assert world.record("a-ran")["deaths"] == dead.incarnation
    assert world.engine().ints("queued_tokens", "running_tokens") == (20, 0)
    assert not world.stream(), "the router is not asked again"
    calls = heir.claim() or ()
    assert [c.fence.call_id for c in calls] == ["a-ran", "b-queued"]
    assert dead.finish(old) == "stale"
    assert dead.finish(cancelled) == "again"
    assert [heir.finish(c) for c in calls] == ["done", "done"]


def test_a_worker_that_keeps_dying_with_a_call_loses_it(world: World) -> None:
    worker = world.worker()
    world.queue("c1", inbox="box")
    for _ in range(world.settings.max_deaths):
        worker.take()
        world.lapse()
        worker = world.worker()
    record = world.record("c1")
    assert (record["state"], record["error_code"]) == ("FAILED", "attempts_exhausted")
    assert world.dead()[0]["error_code"] == "attempts_exhausted"
    assert worker.claim() == []


def test_a_new_worker_hears_no_old_orders(world: World) -> None:
    worker = world.worker()
    world.start("c1", worker)
    world.cancel("c1")
    world.lapse()
    heir = world.worker()
    assert heir.orders() == []
    world.start("c2", heir)
    world.cancel("c2")
    assert [o["id"] for o in heir.orders()] == ["c2"]


def test_a_new_worker_counts_its_claims_from_one(world: World) -> None:
    worker = world.worker()
    world.start("c1", worker)
    assert worker.claims == 1
    world.lapse()
    heir = world.worker()
    assert [c.fence.attempt for c in heir.claim(claim_no=1) or ()] == [2]


# -- heartbeat


def test_a_heartbeat_renews_the_lease_and_reports_the_load(world: World) -> None:
    worker = world.worker()
    world.lapse()
    assert worker.beat(tokens_per_s=12.5)
    assert world.db.zscore(world.keys.engines, "e1") > LONG_AGO
    (view,) = world.run(world.transitions.look()).engines
    assert (view.state, view.tokens_per_s) == ("READY", 12.5)
    assert world.run(world.transitions.reap()) == (0, [])


def test_a_heartbeat_after_the_reaper_is_fenced(world: World) -> None:
    worker = world.worker()
    world.lapse()
    world.run(world.transitions.reap())
    assert not worker.beat()
    assert world.engine()["state"] == "DEAD"
    assert worker.up().beat(), "it may register anew"


def test_a_heartbeat_of_a_stranger_is_fenced(world: World) -> None:
    world.worker()
    assert not FakeWorker(world.settings, server=world.db).beat()
    assert not FakeWorker(world.settings, "unknown", server=world.db).beat()
    assert not world.engine("unknown")


def test_a_drain_holds_until_the_worker_has_seen_it(world: World) -> None:
    worker = world.worker()
    world.run(world.transitions.drain("e1"))
    assert worker.beat("READY")
    assert world.engine()["state"] == "DRAINING"
    worker.beat("STOPPED")
    assert world.engine()["state"] == "STOPPED"
    assert not worker.beat("READY")


# -- reap


def test_a_held_lease_is_left_alone(world: World) -> None:
    world.start("c1", world.worker())
    assert world.run(world.transitions.reap()) == (0, [])
    assert world.running() == ["c1"]


def test_a_dead_engines_calls_go_back_to_the_router(world: World) -> None:
    worker = world.worker()
    call = world.start("running", worker, model="m", session="s", prompt_tokens=5000)
    world.queue("queued", prompt_tokens=7)
    world.lapse()
    assert world.run(world.transitions.reap()) == (2, ["e1"])
    assert (world.running(), world.waiting(), world.engine()["state"]) == ([], [], "DEAD")
    assert world.engine().ints("queued_tokens", "running_tokens") == (0, 0)
    assert [f["id"] for _, f in world.stream()] == ["running", "queued"]
    assert world.entry_of("running")[1] == {
        "id": "running", "gen": call.fence.gen, "session": "s", "model": "m", "prompt_tokens": "5000",
    }  # fmt: skip
    assert world.entry_of("queued")[1]["prompt_tokens"] == "7", "it is weighed as it was the first time"
    assert world.record("running").ints("attempt", "failures") == (2, 0)
    assert world.record("running")["deaths"] == worker.incarnation
    assert (world.record("queued")["attempt"], world.record("queued")["deaths"]) == ("1", "")
    assert world.run(world.transitions.reap()) == (0, []), "a death is told once"
    assert 0 < world.db.ttl(world.keys.engine("e1")) <= 3600


def test_reap_moves_a_limited_number_in_each_round(world: World) -> None:
    settings = world.settings.model_copy(update={"batch": 2})
    small = Transitions(world.keys, settings)
    worker = world.worker()
    for i in range(3):
        world.queue(f"r{i}")
    worker.claim()
    for i in range(2):
        world.queue(f"q{i}")
    world.lapse()
    assert [world.run(small.reap()) for _ in range(4)] == [(2, ["e1"]), (2, []), (1, []), (0, [])]
    assert sorted(f["id"] for _, f in world.stream()) == ["q0", "q1", "r0", "r1", "r2"]
    assert world.engine().ints("queued_tokens") == (0,)


def test_reap_shares_its_limit_among_engines(world: World) -> None:
    small = Transitions(world.keys, world.settings.model_copy(update={"batch": 2}))
    for e in ("e1", "e2"):
        world.worker(e)
        for i in range(2):
            world.queue(f"{e}-{i}", e)
        world.lapse(e)
    reaped = [world.run(small.reap()) for _ in range(3)]
    assert [r.moved for r in reaped] == [2, 2, 0]
    assert sorted(e for r in reaped for e in r.engines) == ["e1", "e2"]
    assert len(world.stream()) == 4


def test_a_call_that_dies_with_every_engine_fails(world: World) -> None:
    world.submit("c1", inbox="box")
    for i in range(world.settings.max_deaths):
        worker = world.worker(f"e{i}")
        assert world.assign("c1", f"e{i}").code == "assigned"
        worker.take()
        world.lapse(f"e{i}")
        world.run(world.transitions.reap())
    record = world.record("c1")
    assert (record["state"], record["error_code"], record["attempt"]) == ("FAILED", "attempts_exhausted", "3")
    assert "3 engine processes" in record["error"]
    (letter,) = world.dead()
    assert (letter["error_code"], letter["attempts"]) == ("attempts_exhausted", "3")
    assert world.news("box")[0]["error_code"] == "attempts_exhausted"


@pytest.mark.parametrize(("flag", "state"), [("user", "CANCELLED"), ("deadline", "FAILED")])
def test_a_flagged_call_of_a_dead_engine_ends(world: World, flag: str, state: str) -> None:
    world.start("c1", world.worker(), inbox="box", deadline_ms=1 << 50)
    if flag == "user":
        world.cancel("c1", "enough")
    else:
        world.db.zadd(world.keys.deadlines, {"c1": LONG_AGO})
        world.run(world.transitions.expire())
    world.lapse()
    assert world.run(world.transitions.reap()) == (1, ["e1"])
    assert world.state("c1") == state
    assert world.news("box")[0]["state"] == state
    assert not world.stream()


def test_a_supervisor_may_report_the_death_of_one_incarnation(world: World) -> None:
    worker = world.worker()
    world.queue("c1")
    assert world.run(world.transitions.reap("e1", "another")) == (0, [])
    assert world.run(world.transitions.reap("unknown", "x")) == (0, [])
    assert world.run(world.transitions.reap("e1", worker.incarnation)) == (1, ["e1"])
    assert world.engine()["state"] == "DEAD"


def test_an_engine_dead_for_long_is_no_longer_listed(world: World) -> None:
    world.worker()
    world.lapse()
    world.run(world.transitions.reap())
    assert world.db.zscore(world.keys.engines, "e1") is None
    assert world.db.ttl(world.keys.engine("e1")) > 0


def test_an_engine_newly_dead_stays_listed(world: World) -> None:
    world.worker()
    world.db.zadd(world.keys.engines, {"e1": _now(world) - 60_000})
    world.run(world.transitions.reap())
    assert [e.state for e in world.run(world.transitions.look()).engines] == ["DEAD"]


def test_a_stopped_engine_is_not_dead(world: World) -> None:
    world.worker().beat("STOPPED")
    world.lapse()
    assert world.run(world.transitions.reap()) == (0, [])
    assert world.engine()["state"] == "STOPPED"


def test_an_engine_whose_hash_has_expired_is_forgotten_and_not_reported(world: World) -> None:
    worker = world.worker()
    world.start("c1", worker)
    worker.beat("STOPPED")
    world.db.zadd(world.keys.engines, {"e1": _now(world) - world.settings.lease_ms - 1})
    world.db.delete(world.keys.engine("e1"))
    assert world.run(world.transitions.reap()) == (1, []), "what it still had goes to others"
    assert world.db.zscore(world.keys.engines, "e1") is None
    assert not world.db.exists(world.keys.engine("e1"))


# -- drain


def test_a_drained_engine_keeps_what_runs_and_gives_back_what_waits(world: World) -> None:
    small = Transitions(world.keys, world.settings.model_copy(update={"batch": 2}))
    worker = world.worker()
    call = world.start("running", worker)
    for i in range(3):
        world.queue(f"q{i}")
    assert [world.run(small.drain("e1")) for _ in range(3)] == [2, 1, 0]
    assert worker.orders() == [{"op": "drain"}]
    assert (world.engine()["state"], world.engine().ints("queued_tokens")) == ("DRAINING", (0,))
    assert [f["id"] for _, f in world.stream()] == ["q0", "q1", "q2"]
    assert world.record("q0")["attempt"] == "1"
    assert worker.finish(call) == "done"


def test_stop_is_told_also_while_draining(world: World) -> None:
    worker = world.worker()
    world.run(world.transitions.drain("e1"))
    assert world.run(world.transitions.drain("e1", "stop")) == 0
    assert worker.orders() == [{"op": "drain"}, {"op": "stop"}]


def test_a_worker_that_drains_itself_drains_no_successor(world: World) -> None:
    """One that stood still until others took its id, or whose order was on its way for long."""
    old = world.worker()
    world.lapse()
    successor = world.worker()
    assert world.run(world.transitions.drain("e1", incarnation=old.incarnation)) == -1
    assert (world.engine()["state"], successor.orders()) == ("READY", [])
    assert world.run(world.transitions.drain("e1", incarnation=successor.incarnation)) == 0
    assert world.engine()["state"] == "DRAINING"


def test_an_order_is_given_once_however_many_rounds_it_takes(world: World) -> None:
    worker = world.worker()
    for i in range(3):
        world.queue(f"q{i}")
    small = Transitions(world.keys, world.settings.model_copy(update={"batch": 2}))
    assert [world.run(small.drain("e1", "stop")) for _ in range(3)] == [2, 1, 0]
    assert worker.orders() == [{"op": "stop"}]
    worker.beat("STOPPED")
    worker.up()
    world.run(world.transitions.drain("e1", "stop"))
    assert worker.orders() == [{"op": "stop"}], "it came back since"


@pytest.mark.parametrize("state", ["none", "STOPPED", "DEAD"])
def test_there_is_no_engine_to_drain(world: World, state: str) -> None:
    if state != "none":
        world.worker()
        world.db.hset(world.keys.engine("e1"), "state", state)
    assert world.run(world.transitions.drain("e1")) == -1
    assert not world.db.exists(world.keys.control("e1"))


# -- unpark


def test_parked_calls_go_back_oldest_first(world: World) -> None:
    small = Transitions(world.keys, world.settings.model_copy(update={"batch": 2}))
    for i in range(3):
        world.submit(f"c{i}", model="m")
        world.db.hset(world.keys.call(f"c{i}"), "submitted_ms", 100 - i)
        world.assign(f"c{i}", "")
    world.submit("other", model="m2")
    world.assign("other", "")
    assert [world.run(small.unpark("m")) for _ in range(3)] == [2, 1, 0]
    assert [f["id"] for _, f in world.stream()] == ["c2", "c1", "c0"]
    assert world.db.zcard(world.keys.parked("m2")) == 1
    world.worker()
    assert world.assign("c0").code == "assigned"


def test_calls_that_named_no_model_are_parked_apart(world: World) -> None:
    world.submit("c1")
    world.assign("c1", "")
    assert world.run(world.transitions.unpark("m")) == 0
    assert world.run(world.transitions.unpark("")) == 1


# -- expire


def test_a_waiting_call_expires(world: World) -> None:
    worker = world.worker()
    world.queue("queued", deadline_ms=1 << 50, inbox="box")
    world.submit("parked", deadline_ms=1 << 50)
    world.assign("parked", "")
    world.submit("pushed", deadline_ms=LONG_AGO)
    world.queue("later", deadline_ms=1 << 50)
    world.db.zadd(world.keys.deadlines, {"queued": LONG_AGO, "parked": LONG_AGO})
    assert world.run(world.transitions.expire()) == 3
    for call_id in ("queued", "parked", "pushed"):
        assert (world.state(call_id), world.record(call_id)["error_code"]) == ("FAILED", "deadline_exceeded")
    assert world.news("box")[0]["error_code"] == "deadline_exceeded"
    assert [c.fence.call_id for c in worker.claim() or ()] == ["later"]
    assert world.run(world.transitions.expire()) == 0


def test_a_running_call_that_expires_is_aborted(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, deadline_ms=1 << 50)
    world.db.zadd(world.keys.deadlines, {"c1": LONG_AGO})
    assert world.run(world.transitions.expire()) == 1
    assert worker.orders() == [{"op": "cancel", "id": "c1", "gen": call.fence.gen, "attempt": "1"}]
    assert worker.finish(call, "almost") == "done"
    record = world.record("c1")
    assert (record["state"], record["error_code"]) == ("FAILED", "deadline_exceeded")
    assert world.result("c1")["text"] == "almost"


def test_expire_works_in_rounds(world: World) -> None:
    small = Transitions(world.keys, world.settings.model_copy(update={"batch": 2}))
    for i in range(3):
        world.submit(f"c{i}", deadline_ms=LONG_AGO)
    assert [world.run(small.expire()) for _ in range(2)] == [2, 1]


# -- leave


def test_a_consumer_leaves_unless_entries_are_pending_for_it(world: World) -> None:
    def consumers() -> list[str]:
        return [codec.text(c["name"]) for c in world.db.xinfo_consumers(world.keys.calls, ROUTER_GROUP)]

    world.submit("c1")
    world.db.xreadgroup(ROUTER_GROUP, "busy", {world.keys.calls: ">"})
    world.db.xgroup_createconsumer(world.keys.calls, ROUTER_GROUP, "idle")
    assert [world.run(world.transitions.leave(name)) for name in ("busy", "idle", "unknown")] == [False, True, True]
    assert consumers() == ["busy"]
    world.worker()
    world.assign("c1")
    assert world.run(world.transitions.leave("busy"))
    assert consumers() == []


# -- names


def test_everything_may_be_called_0(world: World) -> None:
    """Fields that are zero need not be stored, but a name is no number."""
    worker = world.worker("0", "0")
    call = world.start("0", worker, session="0", model="0", inbox="0", stream=True)
    assert (call.fence.call_id, call.session, call.inbox) == ("0", "0", "0")
    assert (world.record("0")["engine"], world.record("0")["model"]) == ("0", "0")
    assert worker.publish(call, "0") == ["ok"]
    worker.release(call, fault=True, error="0")
    world.assign("0", "0", bind=True)
    assert world.session("0")["engine"] == "0"
    assert world.cancel_session("0", "0") == 1
    assert (world.state("0"), world.record("0")["error"]) == ("CANCELLED", "0")
    assert [n["state"] for n in world.news("0")] == ["", "CANCELLED"]
    assert not world.open_calls("0")


# -- transition


def test_the_legal_steps(world: World) -> None:
    step = world.transitions.transition
    ends = (RequestState.COMPLETED, RequestState.CANCELLED, RequestState.FAILED)
    for end in ends:
        for started in (True, False):
            if end is RequestState.COMPLETED and not started:
                continue
            call_id = f"{end}-{started}"
            assert world.run(step(call_id, RequestState.PENDING, "s", "e1")) == (True, "")
            if started:
                assert world.run(step(call_id, RequestState.RUNNING)) == (True, "PENDING")
            assert world.run(step(call_id, end, reason="because")) == (True, "RUNNING" if started else "PENDING")
            assert (world.state(call_id), world.record(call_id)["error"]) == (end, "because")
            assert world.record(call_id)["engine"] == "e1"
            assert world.db.ttl(world.keys.call(call_id)) > 0
    assert not world.open_calls("s")


def test_the_illegal_steps(world: World) -> None:
    states = list(RequestState)
    paths = {
        RequestState.PENDING: [RequestState.PENDING],
        RequestState.RUNNING: [RequestState.PENDING, RequestState.RUNNING],
        RequestState.COMPLETED: [RequestState.PENDING, RequestState.RUNNING, RequestState.COMPLETED],
        RequestState.CANCELLED: [RequestState.PENDING, RequestState.CANCELLED],
        RequestState.FAILED: [RequestState.PENDING, RequestState.FAILED],
    }
    legal = {("PENDING", "RUNNING"), ("PENDING", "CANCELLED"), ("PENDING", "FAILED")}
    legal |= {("RUNNING", end) for end in ("COMPLETED", "CANCELLED", "FAILED")}
    for before, path in paths.items():
        for step in path:
            assert world.run(world.transitions.transition(before, step, "s", "e1"))[0]
        for after in states:
            if (before, after) not in legal:
                assert world.run(world.transitions.transition(before, after)) == (False, before)
        assert world.state(before) == before
    for after in states[1:]:
        assert world.run(world.transitions.transition("unknown", after)) == (False, "")
    world.run(world.transitions.cancel_session("s", "", "0"))


# -- session


def test_a_session_begins_once(world: World) -> None:
    assert [world.run(world.transitions.session("start", "s")) for _ in range(2)] == [1, 0]
    assert world.session("s")["service"] == "0"
    assert world.db.ttl(world.keys.session("s")) > 0


def test_a_session_ends_when_no_call_is_open(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, session="s")
    assert world.run(world.transitions.session("end", "s")) == 1
    worker.finish(call, resident_tokens=5)
    assert world.run(world.transitions.session("end", "s")) == 0
    assert not world.db.exists(world.keys.session("s"), world.keys.affinity("s"), world.keys.session_recent("s"))


def test_a_session_is_charged_along_its_longest_path(world: World) -> None:
    def charge(inherited: int | str, service: int) -> int:
        return world.run(world.transitions.session("charge", "s", inherited, service, 5))

    assert [charge("", 100), charge("", 50), charge(100, 20), charge(150, 30)] == [100, 150, 150, 180]
    assert (world.session("s")["waiting_ms"], world.session("s")["completed"]) == ("20", "4")
    assert world.db.ttl(world.keys.session("s")) > 0


# -- look


def test_look_shows_loads_and_caches(world: World) -> None:
    worker = world.worker("e1")
    world.worker("e2", "m2")
    world.start("c1", worker, session="s")
    world.queue("c2")
    world.submit("c3", session="s")
    world.assign("c3", bind=True)
    world.db.hset(world.keys.affinity("s"), mapping={"e1": "70:5", "e2": "8:6"})
    look = world.run(world.transitions.look(["s", "unknown"]))
    e1, e2 = sorted(look.engines, key=lambda e: e.id)
    assert (e1.queued, e1.running, e1.queued_tokens, e1.running_tokens, e1.load_tokens) == (2, 1, 20, 10, 30)
    assert (e1.served, e2.served, e2.model, e2.load_tokens) == (3, 0, "m2", 0)
    assert (look.sessions["s"].bound, look.sessions["s"].resident) == ("e1", {"e1": 70, "e2": 8})
    assert (look.sessions["unknown"].bound, look.sessions["unknown"].resident) == ("", {})
    world.db.delete(world.keys.affinity("s"))


# -- generations


def test_a_reused_id_is_not_hit_by_what_was_meant_for_its_predecessor(world: World) -> None:
    worker = world.worker()
    old = world.start("c1", worker, stream=True)
    worker.publish(old, "old")
    world.cancel("c1")
    (order,) = worker.orders()
    worker.finish(old)
    world.forget("c1")
    new = world.start("c1", worker, stream=True, inbox="box")
    assert new.fence.gen != old.fence.gen
    assert new.fence.attempt == old.fence.attempt
    assert worker.publish(old, "late") == ["stale"]
    assert worker.release(old, fault=True) == ["stale"]
    assert worker.finish(old) == "stale"
    assert order["gen"] == old.fence.gen != new.fence.gen, "the worker can tell whom the old order meant"
    assert "cancel" not in world.record("c1")
    assert (world.state("c1"), world.record("c1").ints("events"), world.news("box")) == ("RUNNING", (0,), [])
    assert worker.finish(new) == "done"
    assert world.state("c1") == "COMPLETED"


def test_one_run_of_every_script_survives_a_server_without_scripts(world: World) -> None:
    world.db.script_flush()
    worker = world.worker()
    assert worker.finish(world.start("c1", worker)) == "done"
    world.db.script_flush()
    commands: list[Command[Any]] = [world.transitions.look(), world.transitions.expire(), world.transitions.reap()]
    assert [type(r).__name__ for r in scripts.run_all(world.db, commands)] == ["Look", "int", "Reaped"]
