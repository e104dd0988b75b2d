"""The synchronous client against a real server, a real router and workers whose answers are scripted."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from rsm.broker import (
    BrokerUnavailable,
    CallCancelled,
    CallFailed,
    CallRecord,
    Client,
    Conflict,
    Delta,
    InvalidRequest,
    RequestState,
    Settings,
    UnknownCall,
)
from rsm.broker.client import inbox
from rsm.broker.client import sync as client_module
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.transitions import Claimed
from tests.support.fake_worker import FakeWorker, echo, hold, patient, refuse, routing
from tests.support.waiting import eventually

WAIT = 20.0


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short blocking reads, because `close` waits for one."""
    for module in (client_module, inbox):
        monkeypatch.setattr(module, "_BLOCK_S", 0.02)


@pytest.fixture
def reconciling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missed events are looked for at once. In other tests the timer is long, so the inbox must deliver the events."""
    monkeypatch.setattr(inbox, "RECONCILE_S", 0.0)


@pytest.fixture
def router(settings: Settings) -> Iterator[None]:
    with routing(patient(settings)):
        yield


@pytest.fixture
def worker(settings: Settings, router: None) -> Iterator[FakeWorker]:
    """A worker behind a router, driven by the test."""
    fake = FakeWorker(settings).up()
    yield fake
    fake.close()


@pytest.fixture
def other(settings: Settings) -> Iterator[Client]:
    """A second client, like one of another process."""
    with Client(settings=settings) as c:
        yield c


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


@pytest.fixture
def deaf(client: Client, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The client receives no events until this is called."""
    listen = client._ensure_reader
    monkeypatch.setattr(client, "_ensure_reader", lambda: None)
    return listen


# -- ends


def test_a_result(client: Client, worker: FakeWorker) -> None:
    handle = client.submit("Explain quantum computing", session="s", max_tokens=64)
    early = handle.done
    worker.finish(worker.take_soon(), "It is strange.", prompt_tokens=3, completion_tokens=4, cached_tokens=2)
    result = handle.result(WAIT)
    assert (result.text, result.token_ids, result.finish_reason) == ("It is strange.", [1, 2], "stop")
    assert (result.request_id, result.session_id, result.engine_id) == (handle.id, "s", "e1")
    assert (result.prompt_tokens, result.completion_tokens, result.cached_tokens, result.attempts) == (3, 4, 2, 1)
    assert result.latency >= result.waiting_time >= 0
    assert result.ttft is not None
    assert result.ttft >= result.waiting_time
    assert (early, handle.done) == (False, True)
    assert handle.result() == result, "as often as one likes"
    assert handle.record().result == result


def test_many_results(client: Client, settings: Settings, router: None) -> None:
    """More calls than a batch holds, on two engines."""
    with FakeWorker(settings, "e1").serving(echo), FakeWorker(settings, "e2").serving(echo):
        prompts = [f"call {i}" for i in range(settings.batch + 50)]
        handles = client.submit_many([client.prepare(p) for p in prompts])
        results = [h.result(WAIT) for h in handles]
    assert [r.text for r in results] == prompts
    assert {r.engine_id for r in results} == {"e1", "e2"}


def test_threads_share_a_client(
    client: Client, settings: Settings, router: None, background: Callable[..., Future[Any]]
) -> None:
    with FakeWorker(settings).serving(echo):
        waits = [background(lambda i=i: client.submit(f"call {i}").result(WAIT).text) for i in range(20)]
        assert [w.result(WAIT) for w in waits] == [f"call {i}" for i in range(20)]


def test_token_ids_and_openai_bodies(client: Client, worker: FakeWorker) -> None:
    client.submit([1, 2, 3])
    assert worker.take_soon().body == client.prepare([1, 2, 3]).body
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 1}
    client.submit(body, kind="chat.completions", temperature=0)
    call = worker.take_soon()
    assert (call.kind, call.body) == (
        "chat.completions",
        client.prepare({**body, "temperature": 0}, kind="chat.completions").body,
    )


def test_a_failure(client: Client, settings: Settings, router: None) -> None:
    with FakeWorker(settings).serving(refuse):
        handle = client.submit("hi")
        with pytest.raises(CallFailed, match=r"The engine broke\.") as failed:
            handle.result(WAIT)
    assert failed.value.error_code == "engine_error"
    assert (failed.value.record.request_id, failed.value.record.state) == (handle.id, RequestState.FAILED)
    assert handle.wait().error_code == "engine_error", "`wait` returns the record instead"


def test_no_engine_serves_the_model(client: Client, worker: FakeWorker) -> None:
    with pytest.raises(CallFailed, match=r"No engine serves the model 'gpt-9'\. Available models: m") as failed:
        client.submit("hi", model="gpt-9").result(WAIT)
    assert failed.value.error_code == "no_engine_for_model"


def test_a_deadline(client: Client, worker: FakeWorker) -> None:
    with pytest.raises(CallFailed) as failed:
        client.submit("hi", deadline_ms=client.deadline_in(0.2)).result(WAIT)
    assert failed.value.error_code == "deadline_exceeded"


def test_a_prompt_never_shows(client: Client) -> None:
    handle = client.submit("my secret")
    assert "secret" not in repr(handle)
    assert "secret" not in repr(handle.record())
    assert handle.id in repr(handle)


def test_a_callback_at_the_end(client: Client, settings: Settings, router: None) -> None:
    ended: list[str] = []
    with FakeWorker(settings).serving(echo):
        handle = client.submit("hi", id="c1")
        handle.add_done_callback(lambda h: ended.append(h.id))
        handle.result(WAIT)
        eventually(lambda: ended == ["c1"])
    handle.add_done_callback(lambda h: ended.append("at once"))
    assert ended == ["c1", "at once"]


def test_a_callback_that_raises_stops_no_events(client: Client, settings: Settings, router: None) -> None:
    with FakeWorker(settings).serving(echo):
        first = client.submit("first")
        first.add_done_callback(_raise)
        first.result(WAIT)
        assert client.submit("second").result(WAIT).text == "second"


def _raise(_: object) -> None:
    raise RuntimeError("a user's own mistake")


# -- cancelling


def test_a_waiting_call_is_cancelled(client: Client, worker: FakeWorker) -> None:
    handle = client.submit("hi")
    eventually(lambda: handle.record().engine_id)
    assert handle.cancel("no longer needed")
    with pytest.raises(CallCancelled, match="no longer needed") as cancelled:
        handle.result(WAIT)
    assert cancelled.value.record.state is RequestState.CANCELLED
    assert cancelled.value.partial_text == ""
    assert worker.claim() == []


def test_a_running_call_is_cancelled_and_keeps_what_it_has(client: Client, settings: Settings, router: None) -> None:
    with FakeWorker(settings).serving(hold):
        handle = client.submit("hi")
        eventually(lambda: handle.record().state is RequestState.RUNNING)
        assert client.cancel(handle.id)
        with pytest.raises(CallCancelled) as cancelled:
            handle.result(WAIT)
    assert cancelled.value.partial_text == "partial"


def test_what_cannot_be_cancelled(client: Client, settings: Settings, router: None) -> None:
    with FakeWorker(settings).serving(echo):
        handle = client.submit("hi")
        handle.result(WAIT)
    assert not handle.cancel()
    assert not client.cancel("unknown")
    for bad in ("", "a b", "x" * 129):
        with pytest.raises(InvalidRequest):
            client.cancel(bad)


def test_a_session_is_cancelled(client: Client, settings: Settings, router: None) -> None:
    answers: dict[str, Callable[[FakeWorker, Claimed], None]] = {"s": hold, "t": echo}
    with FakeWorker(settings, max_num_seqs=8).serving(lambda w, c: answers[c.session](w, c)):
        ours = [client.submit("hi", session="s") for _ in range(5)]
        theirs = client.submit("hi", session="t")
        eventually(lambda: all(h.record().state is RequestState.RUNNING for h in ours))
        assert client.cancel_session("s", "the user left") == 5
        for handle in ours:
            with pytest.raises(CallCancelled, match="the user left"):
                handle.result(WAIT)
        assert theirs.result(WAIT).text == "hi"
        answers["s"] = echo
        assert client.submit("again", session="s").result(WAIT).text == "again"
        assert client.cancel_session("s") == 0
    with pytest.raises(InvalidRequest):
        client.cancel_session("{s}")


# -- the same id again


def test_a_repeated_push_is_the_same_call(client: Client, other: Client, settings: Settings, router: None) -> None:
    ran: list[str] = []

    def answer(worker: FakeWorker, call: Claimed) -> None:
        ran.append(call.fence.call_id)
        echo(worker, call)

    first = client.submit("hi", id="c1")
    assert client.submit("hi", id="c1") is first
    with FakeWorker(settings).serving(answer):
        assert first.result(WAIT).text == "hi"
        late, foreign = client.submit("hi", id="c1"), other.submit("hi", id="c1")
        assert late.done, "its result is there at once"
        assert late.result(WAIT) == foreign.result(WAIT) == first.result()
    assert ran == ["c1"]


def test_a_producer_that_comes_back_gets_the_events(client: Client, other: Client, worker: FakeWorker) -> None:
    client.submit("hi", id="c1")
    again = other.submit("hi", id="c1")
    worker.finish(worker.take_soon(), "hello")
    assert again.result(WAIT).text == "hello"


def test_a_call_can_be_awaited_by_its_id(
    client: Client, other: Client, worker: FakeWorker, reconciling: None, background: Callable[..., Future[Any]]
) -> None:
    first = client.submit("hi", id="c1")
    handle = other.handle("c1")
    assert other.handle("c1") is handle
    assert (handle.session, handle.done) == ("c1", False)
    waits = [background(other.result, "c1", WAIT), background(client.result, "c1", WAIT)]
    worker.finish(worker.take_soon(), "hello")
    assert {w.result(WAIT).text for w in waits} == {"hello"}
    assert handle.result(WAIT) == first.result(WAIT), "the first client still receives the end"
    assert other.result("c1", WAIT).text == "hello", "also after its end"


def test_a_process_that_died_left_a_call_to_another(client: Client, settings: Settings, worker: FakeWorker) -> None:
    push = (
        "import os; from rsm.broker import Client; "
        f"Client({settings.url()!r}, namespace={settings.namespace!r}).submit('hi', id='c1'); os._exit(9)"
    )
    died = subprocess.run([sys.executable, "-c", push], capture_output=True, timeout=60, check=False)
    assert died.returncode == 9, died.stderr.decode()
    worker.finish(worker.take_soon(), "hello")
    assert client.result("c1", WAIT).text == "hello"


def test_an_unknown_id(client: Client) -> None:
    for ask in (client.record, client.handle, client.result):
        with pytest.raises(UnknownCall, match="There is no call c1"):
            ask("c1")
    with pytest.raises(InvalidRequest):
        client.record("not an id")


def test_another_body_under_the_same_id_is_a_conflict(client: Client, other: Client, worker: FakeWorker) -> None:
    first = client.submit("hi", id="c1")
    for c in (client, other):
        with pytest.raises(Conflict, match="c1 already belongs to a different call"):
            c.submit("bye", id="c1")
    assert client.handle("c1") is first, "the call itself is still awaited"
    worker.finish(worker.take_soon(), "hello")
    assert first.result(WAIT).text == "hello"


def test_a_conflict_leaves_its_neighbours_alone(client: Client, other: Client, worker: FakeWorker) -> None:
    other.submit("mine", id="taken")
    worker.finish(worker.take_soon())
    calls = [client.prepare("hi", id=i) for i in ("a", "taken", "b")]
    with pytest.raises(Conflict, match="taken"):
        client.submit_many([*calls, client.prepare("else", id="a")])
    handles = [client.handle(i) for i in ("a", "b")]
    assert all(h._pushed for h in handles)
    for _ in handles:
        worker.finish(worker.take_soon(), "hello")
    assert [h.result(WAIT).text for h in handles] == ["hello", "hello"]


# -- what can never run


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("hi", {"id": ""}, "id must be 1 to 128 characters"),
        ("hi", {"id": "a b"}, "id must be"),
        ("hi", {"id": "{a}"}, "id must be"),
        ("hi", {"id": "a*"}, "id must be"),
        ("hi", {"id": "a\n"}, "id must be"),
        ("hi", {"id": "é"}, "id must be"),
        ("hi", {"id": "x" * 129}, "id must be"),
        ("hi", {"id": "c1:events"}, "id must not end"),
        ("hi", {"session": ""}, "session must be"),
        ("hi", {"session": "a/b"}, "session must be"),
        ("hi", {"session": "s:calls"}, "session must not end"),
        ("hi", {"model": "a b"}, "model must be"),
        ("hi", {"kind": "images"}, "kind"),
        ("hi", {"priority": 128}, "priority"),
        ("hi", {"priority": -129}, "priority"),
        ("hi", {"priority": "urgent"}, "priority"),
        ("hi", {"deadline_ms": -1}, "deadline_ms"),
        ("hi", {"prompt_tokens": -1}, "prompt_tokens"),
        ("hi", {"traceparent": "x" * 257}, "traceparent"),
        ("hi", {"max_tokens": object()}, "cannot be encoded"),
        ("hi", {"seed": 1 << 64}, "cannot be encoded"),
        ("lone \ud800", {}, "cannot be encoded"),
        ("hi", {"prompt_token_ids": [1]}, 'either a "prompt"'),
        ({}, {}, 'either a "prompt"'),
        ({"max_tokens": 5}, {}, 'either a "prompt"'),
        ("", {}, "non-empty text"),
        ([], {}, "non-empty list"),
        ([1, -1], {}, "that are at least 0"),
        ([1, True], {}, "whole numbers"),
        (["hi"], {}, "whole numbers"),
        ({"prompt": 5}, {}, '"prompt" must be non-empty text'),
        ("hi", {"kind": "chat.completions"}, '"messages"'),
        ({"messages": "hi"}, {"kind": "chat.completions"}, '"messages"'),
        ({"messages": []}, {"kind": "completions"}, '"prompt"'),
        ({"prompt": "hi"}, {"kind": "embeddings"}, '"input"'),
        ("x" * 2000, {}, "more than the limit of 1024"),
    ],
)
def test_a_call_that_can_never_run(db: redis.Redis, settings: Settings, prompt: Any, options: Any, says: str) -> None:
    client = Client(settings=settings.model_copy(update={"max_body_bytes": 1024}))
    with client, pytest.raises(InvalidRequest, match=says) as refused:
        client.submit(prompt, **options)
    assert isinstance(refused.value, ValueError)
    assert not db.exists(client.keys.calls), "nothing was pushed"


def test_the_largest_body(settings: Settings) -> None:
    with Client(settings=settings.model_copy(update={"max_body_bytes": 1024})) as client:
        size = len(client.prepare("x" * 900).body) - 900
        client.submit("x" * (1024 - size))
        with pytest.raises(InvalidRequest, match="1025 bytes"):
            client.submit("x" * (1025 - size))


# -- streams


def test_chunks_come_as_they_are_made(client: Client, worker: FakeWorker) -> None:
    handle = client.submit("hi", stream=True)
    call = worker.take_soon()
    chunks = handle.stream()
    for n, text in enumerate("abc"):
        worker.publish(call, text, first=n)
        chunk = next(chunks)
        assert (chunk.n, chunk.text, chunk.token_ids) == (n, text, [n])
        assert not handle.done
    worker.finish(call, "abc")
    assert list(chunks) == []
    assert handle.result(WAIT).text == "abc"
    assert [p.text for p in handle.stream()] == ["a", "b", "c"], "the log can be read again"


def test_a_stream_resumes_after_any_chunk(client: Client, other: Client, worker: FakeWorker) -> None:
    client.submit("hi", id="c1", stream=True)
    call = worker.take_soon()
    worker.publish(call, *"abcd")
    seen: list[Delta] = []
    reader: Client
    for i in range(4):
        reader = (client, other)[i % 2]
        chunks = reader.stream("c1", seen[-1].event_id if seen else "0-0")
        seen.append(next(chunks))
        chunks.close()  # type: ignore[attr-defined]
    worker.publish(call, *"ef", first=4)
    worker.finish(call)
    rest = list(client.stream("c1", seen[-1].event_id))
    assert "".join(p.text for p in [*seen, *rest]) == "abcdef"
    assert [p.n for p in [*seen, *rest]] == list(range(6))
    for i, chunk in enumerate([*seen, *rest]):
        assert [p.n for p in other.stream("c1", chunk.event_id)] == list(range(i + 1, 6))


def test_a_stream_outlives_the_engine_that_started_it(client: Client, settings: Settings, router: None) -> None:
    handle = client.submit("hi", stream=True)
    first = FakeWorker(settings, "e1").up()
    call = first.take_soon()
    first.publish(call, *"ab")
    chunks = handle.stream()
    assert [next(chunks).text, next(chunks).text] == ["a", "b"]
    first.beat("STOPPED")
    first.release(call, fault=True)
    second = FakeWorker(settings, "e2").up()
    call = second.take_soon()
    assert first.publish(call, "x", first=2) == ["stale"]
    second.publish(call, *"abc", first=0)
    second.finish(call)
    assert [(p.n, p.text) for p in chunks] == [(2, "c")]
    for w in (first, second):
        w.close()


def test_a_stream_ends_as_its_call(client: Client, worker: FakeWorker) -> None:
    failing, cancelled = (client.submit("hi", stream=True) for _ in range(2))
    calls = {c.fence.call_id: c for c in (worker.take_soon(), worker.take_soon())}
    for call in calls.values():
        worker.publish(call, "a")
    worker.fail(calls[failing.id])
    cancelled.cancel()
    worker.finish(calls[cancelled.id], "a")
    for handle, error in ((failing, CallFailed), (cancelled, CallCancelled)):
        chunks = handle.stream()
        assert next(chunks).text == "a"
        with pytest.raises(error):
            next(chunks)


def test_a_call_without_a_stream(client: Client) -> None:
    handle = client.submit("hi")
    with pytest.raises(UnknownCall, match="without stream=True"):
        next(handle.stream())
    with pytest.raises(UnknownCall, match="There is no call"):
        next(client.stream("unknown"))


def test_a_stream_loses_no_chunk_that_comes_between_two_reads(
    client: Client, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks and the end come after an empty read of the log, and before the record is read."""
    handle = client.submit("hi", stream=True)
    call = worker.take_soon()
    look, looks = client.record, iter(range(100))

    def record(call_id: str) -> CallRecord:
        if next(looks) == 1:
            worker.publish(call, *"ab")
            worker.finish(call)
        return look(call_id)

    monkeypatch.setattr(client, "record", record)
    assert [p.text for p in handle.stream()] == ["a", "b"]


def test_a_stream_whose_log_is_gone_ends(client: Client, worker: FakeWorker) -> None:
    handle = client.submit("hi", stream=True)
    call = worker.take_soon()
    worker.publish(call, "a")
    worker.finish(call)
    worker.db.delete(client.keys.events(handle.id))
    assert list(handle.stream()) == []


# -- missed events


def test_an_end_that_the_inbox_lost_is_found_in_the_record(
    client: Client, worker: FakeWorker, deaf: Callable[[], None], reconciling: None
) -> None:
    handle = client.submit("hi")
    worker.finish(worker.take_soon(), "hello")
    assert worker.db.delete(client.keys.inbox(client._inbox))
    deaf()
    assert handle.result(WAIT).text == "hello"


def test_an_end_that_was_trimmed_is_found_in_the_record(
    settings: Settings, router: None, reconciling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = settings.model_copy(update={"inbox_max": 100})
    worker = FakeWorker(small).up()
    with Client(settings=small) as client:
        listen = client._ensure_reader
        monkeypatch.setattr(client, "_ensure_reader", lambda: None)
        handle, noisy = client.submit("hi"), client.submit("hi", stream=True)
        calls = {c.fence.call_id: c for c in (worker.take_soon(), worker.take_soon())}
        worker.finish(calls[handle.id], "hello")
        for first in range(0, 600, 100):
            worker.publish(calls[noisy.id], *(f"{first + i} " for i in range(100)), first=first)
        inbox = worker.db.xrange(client.keys.inbox(client._inbox))
        assert len(inbox) < 600
        assert not [f for _, f in inbox if b"state" in f], "the end is no longer in the inbox"
        listen()
        assert handle.result(WAIT).text == "hello"
        worker.finish(calls[noisy.id])
        assert "".join(p.text for p in noisy.stream()) == "".join(f"{i} " for i in range(600))
    worker.close()


def test_a_big_result_comes_from_the_record(client: Client, worker: FakeWorker) -> None:
    text = "x" * 200_000
    handle = client.submit("hi")
    worker.finish(worker.take_soon(), text)
    assert handle.result(WAIT).text == text


def test_a_record_that_expired_before_its_end_was_delivered(
    client: Client, worker: FakeWorker, deaf: Callable[[], None], reconciling: None
) -> None:
    handle = client.submit("hi")
    worker.finish(worker.take_soon())
    worker.db.delete(client.keys.inbox(client._inbox), client.keys.call(handle.id))
    deaf()
    with pytest.raises(UnknownCall, match="expire"):
        handle.result(WAIT)


# -- when Redis is away


def test_a_wait_outlives_redis(short_blocks: None) -> None:
    folder = Path(f"/tmp/rsm-kill-{new_id()}")
    own = EmbeddedRedis(folder)
    settings = Settings(lease_ms=1500, tick_ms=50).with_redis(own.start())
    try:
        with routing(settings), Client(settings=settings) as client:
            client.redis.config_set("appendfsync", "always")  # otherwise a kill may lose the last writes
            release = threading.Event()

            def answer(worker: FakeWorker, call: Claimed) -> None:
                if release.is_set():
                    echo(worker, call)

            handles = [client.submit(f"call {i}", stream=i == 0) for i in range(3)]
            own.kill()
            with ThreadPoolExecutor(2) as pool:
                waits = [pool.submit(h.result, WAIT) for h in handles[1:]]
                chunks = iter(client.stream(handles[0].id))
                first = pool.submit(next, chunks)
                eventually(lambda: not own._answers())
                own.start()
                release.set()
                with FakeWorker(settings).serving(answer):
                    assert [w.result(WAIT).text for w in waits] == ["call 1", "call 2"]
                    assert first.result(WAIT).text == "call"
                    assert [p.text for p in chunks] == ["0"]
    finally:
        own.stop()
        shutil.rmtree(folder)


def test_a_redis_that_never_answers_is_reported(tmp_path: Path) -> None:
    with Client(f"unix://{tmp_path}/none", redis_timeout=0.05) as client:
        for ask in (lambda: client.submit("hi"), lambda: client.record("c1"), lambda: client.cancel("c1")):
            with pytest.raises(BrokerUnavailable, match="did not answer"):
                ask()
        assert not client._open


# -- waiting and closing


def test_a_wait_that_takes_too_long_can_be_repeated(client: Client, worker: FakeWorker) -> None:
    handle = client.submit("hi")
    with pytest.raises(TimeoutError, match="It continues"):
        handle.result(0.01)
    with pytest.raises(TimeoutError):
        client.result(handle.id, 0)
    worker.finish(worker.take_soon(), "hello")
    assert handle.result(WAIT).text == "hello"


def test_close_wakes_all_who_wait(settings: Settings, worker: FakeWorker) -> None:
    client = Client(settings=settings)
    handles = [client.submit("hi", stream=i == 0) for i in range(3)]
    with ThreadPoolExecutor(4) as pool:
        waits: list[Future[Any]] = [pool.submit(h.result) for h in handles]
        waits.append(pool.submit(lambda: list(handles[0].stream())))
        eventually(lambda: client._reader is not None and client._reader.is_alive())
        client.close()
        for wait in waits:
            with pytest.raises(BrokerUnavailable, match="closed"):
                wait.result(WAIT)
    calls = [worker.take_soon() for _ in handles]
    assert {c.fence.call_id for c in calls} == {h.id for h in handles}, "the calls continue"


def test_a_closed_client_says_so(settings: Settings) -> None:
    client = Client(settings=settings)
    client.submit("hi", id="c1")
    client.close()
    client.close()
    asks: list[Callable[[], object]] = [
        lambda: client.submit("hi"),
        lambda: client.cancel("c1"),
        lambda: client.record("c1"),
        lambda: client.cancel_session("c1"),
        lambda: list(client.stream("c1")),
    ]
    for ask in asks:
        with pytest.raises(BrokerUnavailable, match="closed"):
            ask()


def test_close_ends_a_push_that_waits_for_redis(tmp_path: Path, background: Callable[..., Future[Any]]) -> None:
    client = Client(f"unix://{tmp_path}/none")
    push = background(client.submit, "hi")
    eventually(lambda: client._open)
    client.close()
    with pytest.raises(BrokerUnavailable, match="closed"):
        push.result(WAIT)


def test_deadlines_are_on_the_servers_clock(client: Client, db: redis.Redis) -> None:
    seconds, _ = db.time()
    assert 0 <= client.deadline_in(10) - (seconds + 10) * 1000 < 30_000
