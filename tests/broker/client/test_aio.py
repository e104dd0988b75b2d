"""The asyncio client against a real server, a real router and workers whose answers are scripted."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from rsm.broker import (
    AsyncCall,
    AsyncClient,
    BrokerUnavailable,
    CallCancelled,
    CallFailed,
    CallRecord,
    Conflict,
    Delta,
    InvalidRequest,
    RequestState,
    Settings,
    UnknownCall,
)
from rsm.broker.client import aio, inbox
from rsm.broker.client import stream as live_stream
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.transitions import Claimed
from tests.support.fake_worker import FakeWorker, echo, hold, patient, refuse, routing

WAIT = 20.0


@pytest.fixture
def reconciling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missed events are looked for at once. In other tests the timer is long, so the inbox must deliver the events."""
    monkeypatch.setattr(aio, "_BLOCK_S", 0.02)
    monkeypatch.setattr(inbox, "RECONCILE_S", 0.0)
    monkeypatch.setattr(live_stream, "_PATIENCE_S", 0.05)


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
async def client(settings: Settings) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(settings=settings) as c:
        yield c


@pytest.fixture
async def other(settings: Settings) -> AsyncIterator[AsyncClient]:
    """A second client, like one of another process."""
    async with AsyncClient(settings=settings) as c:
        yield c


async def soon(condition: Callable[[], Awaitable[object]]) -> None:
    """`eventually`, without blocking the loop."""
    async with asyncio.timeout(WAIT):
        while not await condition():  # noqa: ASYNC110 - nothing would set an event
            await asyncio.sleep(0.01)


async def taken(worker: FakeWorker) -> Claimed:
    """The next call, claimed."""
    return await asyncio.to_thread(worker.take_soon)


async def all_of(chunks: AsyncIterator[Delta]) -> list[Delta]:
    return [p async for p in chunks]


# -- ends


async def test_a_result(client: AsyncClient, worker: FakeWorker) -> None:
    call = await client.submit("Explain quantum computing", session="s", max_tokens=64)
    early = call.done
    worker.finish(await taken(worker), "It is strange.", prompt_tokens=3, completion_tokens=4, cached_tokens=2)
    result = await call
    assert (early, call.done) == (False, True)
    assert (result.text, result.token_ids, result.finish_reason) == ("It is strange.", [1, 2], "stop")
    assert (result.request_id, result.session_id, result.engine_id) == (call.id, "s", "e1")
    assert (result.prompt_tokens, result.completion_tokens, result.cached_tokens, result.attempts) == (3, 4, 2, 1)
    assert result.latency >= result.waiting_time >= 0
    assert await call.result() == result == await call, "as often as one likes"


async def test_submissions_of_many_tasks_travel_together(client: AsyncClient, settings: Settings, router: None) -> None:
    """More calls than a batch holds, on two engines."""
    n = settings.batch + 50
    with FakeWorker(settings, "e1").serving(echo), FakeWorker(settings, "e2").serving(echo):

        async def ask(i: int) -> tuple[str, str]:
            result = await (await client.submit(f"call {i}")).result(WAIT)
            return result.text, result.engine_id

        answers = await asyncio.gather(*map(ask, range(n)))
    assert [text for text, _ in answers] == [f"call {i}" for i in range(n)]
    assert {engine for _, engine in answers} == {"e1", "e2"}


async def test_a_failure(client: AsyncClient, settings: Settings, router: None) -> None:
    with FakeWorker(settings).serving(refuse):
        call = await client.submit("hi")
        with pytest.raises(CallFailed, match=r"The engine broke\.") as failed:
            await call
    assert failed.value.error_code == "engine_error"
    assert (await call.wait()).state is RequestState.FAILED, "`wait` returns the record instead"


async def test_a_deadline(client: AsyncClient, worker: FakeWorker) -> None:
    call = await client.submit("hi", deadline_ms=await client.deadline_in(0.2))
    with pytest.raises(CallFailed) as failed:
        await call.result(WAIT)
    assert failed.value.error_code == "deadline_exceeded"


async def test_a_prompt_never_shows(client: AsyncClient) -> None:
    call = await client.submit("my secret")
    assert "secret" not in repr(call)
    assert call.id in repr(call)


# -- cancelling


async def test_a_waiting_call_is_cancelled(client: AsyncClient, worker: FakeWorker) -> None:
    call = await client.submit("hi")
    await soon(lambda: _engine_of(client, call))
    assert await call.cancel("no longer needed")
    with pytest.raises(CallCancelled, match="no longer needed"):
        await call.result(WAIT)
    assert worker.claim() == []


async def _engine_of(client: AsyncClient, call: AsyncCall) -> str:
    return (await client.record(call.id)).engine_id


async def _runs(client: AsyncClient, call: AsyncCall) -> bool:
    return (await client.record(call.id)).state is RequestState.RUNNING


async def test_a_running_call_is_cancelled_and_keeps_what_it_has(
    client: AsyncClient, settings: Settings, router: None
) -> None:
    with FakeWorker(settings).serving(hold):
        call = await client.submit("hi")
        await soon(lambda: _runs(client, call))
        assert await client.cancel(call.id)
        with pytest.raises(CallCancelled) as cancelled:
            await call.result(WAIT)
    assert cancelled.value.partial_text == "partial"


async def test_what_cannot_be_cancelled(client: AsyncClient, settings: Settings, router: None) -> None:
    with FakeWorker(settings).serving(echo):
        call = await client.submit("hi")
        await call.result(WAIT)
    assert not await call.cancel()
    assert not await client.cancel("unknown")
    with pytest.raises(InvalidRequest):
        await client.cancel("a b")


async def test_a_session_is_cancelled(client: AsyncClient, settings: Settings, router: None) -> None:
    with FakeWorker(settings).serving(lambda w, c: hold(w, c) if c.session == "s" else echo(w, c)):
        ours = [await client.submit("hi", session="s") for _ in range(5)]
        theirs = await client.submit("hi", session="t")
        for call in ours:
            await soon(lambda call=call: _runs(client, call))  # type: ignore[misc]
        assert await client.cancel_session("s", "the user left") == 5
        for call in ours:
            with pytest.raises(CallCancelled, match="the user left"):
                await call.result(WAIT)
        assert (await theirs.result(WAIT)).text == "hi"
    assert await client.cancel_session("s") == 0
    with pytest.raises(InvalidRequest):
        await client.cancel_session("{s}")


# -- the same id again


async def test_a_repeated_push_is_the_same_call(
    client: AsyncClient, other: AsyncClient, settings: Settings, router: None
) -> None:
    ran: list[str] = []

    def answer(worker: FakeWorker, call: Claimed) -> None:
        ran.append(call.fence.call_id)
        echo(worker, call)

    first, second = await asyncio.gather(client.submit("hi", id="c1"), client.submit("hi", id="c1"))
    assert first is second
    with FakeWorker(settings).serving(answer):
        result = await first.result(WAIT)
        late, foreign = await client.submit("hi", id="c1"), await other.submit("hi", id="c1")
        assert await late.result(WAIT) == await foreign.result(WAIT) == result
    assert ran == ["c1"]


async def test_a_producer_that_comes_back_gets_the_events(
    client: AsyncClient, other: AsyncClient, worker: FakeWorker
) -> None:
    await client.submit("hi", id="c1", stream=True)
    again = await other.submit("hi", id="c1", stream=True)
    call = await taken(worker)
    worker.publish(call, *"ab")
    worker.finish(call, "ab")
    assert [p.text for p in await all_of(again.stream())] == ["a", "b"]
    assert (await again).text == "ab"


async def test_the_first_client_still_receives_the_end(
    client: AsyncClient, other: AsyncClient, worker: FakeWorker, reconciling: None
) -> None:
    first = await client.submit("hi", id="c1", stream=True)
    await other.submit("hi", id="c1", stream=True)
    call = await taken(worker)
    worker.publish(call, *"ab")
    worker.finish(call, "ab")
    assert [p.text for p in await all_of(first.stream())] == ["a", "b"]
    assert (await first).text == "ab"


async def test_a_process_that_died_left_a_call_to_another(
    client: AsyncClient, settings: Settings, worker: FakeWorker
) -> None:
    push = (
        "import asyncio, os; from rsm.broker import AsyncClient\n"
        "async def main():\n"
        f" await AsyncClient({settings.url()!r}, namespace={settings.namespace!r}).submit('hi', id='c1', stream=True)\n"
        " os._exit(9)\n"
        "asyncio.run(main())"
    )
    died = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", push], capture_output=True, timeout=60)
    assert died.returncode == 9, died.stderr.decode()
    call = await taken(worker)
    worker.publish(call, "a")
    again = await client.submit("hi", id="c1", stream=True)
    worker.publish(call, "b", first=1)
    worker.finish(call, "ab")
    assert [p.text for p in await all_of(again.stream())] == ["a", "b"], "also what came before"
    assert [p.text for p in await all_of(client.stream("c1"))] == ["a", "b"]
    assert (await again.result(WAIT)).text == "ab"


async def test_another_body_under_the_same_id_is_a_conflict(
    client: AsyncClient, other: AsyncClient, worker: FakeWorker
) -> None:
    first = await client.submit("hi", id="c1")
    for c in (client, other):
        with pytest.raises(Conflict, match="c1 already belongs to a different call"):
            await c.submit("bye", id="c1")
    worker.finish(await taken(worker), "hello")
    assert (await first.result(WAIT)).text == "hello"


async def test_a_conflict_leaves_its_neighbours_alone(
    client: AsyncClient, other: AsyncClient, settings: Settings, router: None
) -> None:
    await other.submit("mine", id="taken")
    asks = [client.submit("hi", id=i) for i in ("a", "taken", "b")] + [client.submit("else", id="a")]
    a, taken_, b, a_again = await asyncio.gather(*asks, return_exceptions=True)
    assert isinstance(taken_, Conflict)
    assert isinstance(a_again, Conflict)
    with FakeWorker(settings).serving(echo):
        for call in (a, b):
            assert isinstance(call, AsyncCall)
            assert (await call.result(WAIT)).text == "hi"


async def test_an_unknown_id(client: AsyncClient) -> None:
    with pytest.raises(UnknownCall, match="There is no call c1"):
        await client.record("c1")
    with pytest.raises(InvalidRequest):
        await client.record("not an id")


# -- what can never run


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("hi", {"id": "a b"}, "id must be"),
        ("hi", {"id": "x" * 129}, "id must be"),
        ("hi", {"session": "s:calls"}, "session must not end"),
        ("hi", {"kind": "images"}, "kind"),
        ("hi", {"priority": 128}, "priority"),
        ("hi", {"prompt_token_ids": [1]}, 'either a "prompt"'),
        ({}, {}, 'either a "prompt"'),
        ("", {}, "non-empty text"),
        ("x" * 2000, {}, "more than the limit of 1024"),
    ],
)
async def test_a_call_that_can_never_run(
    db: redis.Redis, settings: Settings, prompt: Any, options: Any, says: str
) -> None:
    """The full list is in test_client: both clients share one check."""
    async with AsyncClient(settings=settings.model_copy(update={"max_body_bytes": 1024})) as client:
        with pytest.raises(InvalidRequest, match=says):
            await client.submit(prompt, **options)
        assert not db.exists(client.keys.calls), "nothing was pushed"


# -- streams


async def test_chunks_come_as_they_are_made(client: AsyncClient, worker: FakeWorker) -> None:
    call = await client.submit("hi", stream=True)
    claimed = await taken(worker)
    live, from_log = call.stream(), client.stream(call.id)
    for n, text in enumerate("abc"):
        worker.publish(claimed, text, first=n)
        chunk = await anext(live)
        assert (chunk.n, chunk.text, chunk.token_ids) == (n, text, [n])
        assert await anext(from_log) == chunk, "inbox and log agree, also on the event id"
        assert not call.done
    worker.finish(claimed, "abc")
    assert await all_of(live) == []
    assert await all_of(from_log) == []
    assert (await call).text == "abc"


async def test_a_stream_resumes_after_any_chunk(client: AsyncClient, other: AsyncClient, worker: FakeWorker) -> None:
    call = await client.submit("hi", id="c1", stream=True)
    claimed = await taken(worker)
    worker.publish(claimed, *"abcd")
    live = call.stream()
    seen = [await anext(live), await anext(live)]
    worker.publish(claimed, *"ef", first=4)
    worker.finish(claimed)
    rest = await all_of(other.stream("c1", seen[-1].event_id))
    assert [(p.n, p.text) for p in [*seen, *rest]] == list(enumerate("abcdef"))
    for i, chunk in enumerate([*seen, *rest]):
        assert [p.n for p in await all_of(client.stream("c1", chunk.event_id))] == list(range(i + 1, 6))
    assert [p.n for p in await all_of(live)] == [2, 3, 4, 5]


async def test_a_stream_outlives_the_engine_that_started_it(
    client: AsyncClient, settings: Settings, router: None
) -> None:
    call = await client.submit("hi", stream=True)
    first = FakeWorker(settings, "e1").up()
    claimed = await taken(first)
    first.publish(claimed, *"ab")
    live = call.stream()
    assert [(await anext(live)).text, (await anext(live)).text] == ["a", "b"]
    first.beat("STOPPED")
    first.release(claimed, fault=True)
    second = FakeWorker(settings, "e2").up()
    claimed = await taken(second)
    second.publish(claimed, *"abc", first=0)
    second.finish(claimed)
    assert [(p.n, p.text) for p in await all_of(live)] == [(2, "c")]
    for w in (first, second):
        w.close()


async def test_a_stream_ends_as_its_call(client: AsyncClient, worker: FakeWorker) -> None:
    failing, cancelled = [await client.submit("hi", stream=True) for _ in range(2)]
    calls = {c.fence.call_id: c for c in (await taken(worker), await taken(worker))}
    for claimed in calls.values():
        worker.publish(claimed, "a")
    worker.fail(calls[failing.id])
    await cancelled.cancel()
    worker.finish(calls[cancelled.id], "a")
    for call, error in ((failing, CallFailed), (cancelled, CallCancelled)):
        for chunks in (call.stream(), client.stream(call.id)):
            assert (await anext(chunks)).text == "a"
            with pytest.raises(error):
                await anext(chunks)


async def test_a_call_without_a_stream(client: AsyncClient) -> None:
    call = await client.submit("hi")
    with pytest.raises(UnknownCall, match="without stream=True"):
        call.stream()
    with pytest.raises(UnknownCall, match="without stream=True"):
        await anext(client.stream(call.id))
    with pytest.raises(UnknownCall, match="There is no call"):
        await anext(client.stream("unknown"))


async def test_a_stream_loses_no_chunk_that_comes_between_two_reads(
    client: AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks and the end come after an empty read of the log, and before the record is read."""
    monkeypatch.setattr(aio, "_BLOCK_S", 0.02)
    call = await client.submit("hi", stream=True)
    claimed = await taken(worker)
    look, looks = client.record, iter(range(100))

    async def record(call_id: str) -> CallRecord:
        if next(looks) == 1:
            worker.publish(claimed, *"ab")
            worker.finish(claimed)
        return await look(call_id)

    monkeypatch.setattr(client, "record", record)
    assert [p.text for p in await all_of(client.stream(call.id))] == ["a", "b"]


async def test_chunks_that_the_inbox_lost_come_from_the_log(settings: Settings, router: None) -> None:
    """The loop is blocked while the worker publishes, so the inbox is trimmed before it is read."""
    small = settings.model_copy(update={"inbox_max": 100})
    worker = FakeWorker(small).up()
    async with AsyncClient(settings=small) as client:
        call = await client.submit("hi", stream=True)
        live = call.stream()
        claimed = await taken(worker)
        worker.publish(claimed, "0 ")
        chunks = [await anext(live)]
        for first in range(1, 601, 100):
            worker.publish(claimed, *(f"{first + i} " for i in range(100)), first=first)
        assert worker.db.xlen(client.keys.inbox(client._inbox)) < 600
        worker.finish(claimed, "hello")
        chunks += await all_of(live)
        assert "".join(p.text for p in chunks) == "".join(f"{i} " for i in range(601))
        assert [p.n for p in chunks] == list(range(601))
        assert (await call).text == "hello"
    worker.close()


async def test_a_stream_whose_inbox_vanished(client: AsyncClient, worker: FakeWorker, reconciling: None) -> None:
    call = await client.submit("hi", stream=True)
    claimed = await taken(worker)
    live = call.stream()
    worker.publish(claimed, "a")
    assert (await anext(live)).text == "a"
    worker.publish(claimed, *"bcd", first=1)
    worker.finish(claimed, "abcd")
    worker.db.delete(client.keys.inbox(client._inbox))
    assert [p.text for p in await all_of(live)] == ["b", "c", "d"]
    assert (await call).text == "abcd"


async def test_a_silent_stream_reads_the_log(
    client: AsyncClient, other: AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another client took over the call's events, so none come here. The call continues."""
    monkeypatch.setattr(live_stream, "_PATIENCE_S", 0.02)
    call = await client.submit("hi", id="c1", stream=True)
    await other.submit("hi", id="c1", stream=True)
    claimed = await taken(worker)
    live = call.stream()
    for n, text in enumerate("abc"):
        worker.publish(claimed, text, first=n)
        assert (await anext(live)).text == text
    await live.aclose()  # type: ignore[attr-defined]
    worker.finish(claimed)


# -- missed events


async def test_an_end_that_the_inbox_lost_is_found_in_the_record(
    client: AsyncClient, worker: FakeWorker, reconciling: None
) -> None:
    call = await client.submit("hi")
    claimed = await taken(worker)
    worker.db.hset(client.keys.call(call.id), "inbox", "")
    worker.finish(claimed, "hello")
    assert (await call.result(WAIT)).text == "hello"


async def test_a_big_result_comes_from_the_record(client: AsyncClient, worker: FakeWorker) -> None:
    text = "x" * 200_000
    call = await client.submit("hi")
    worker.finish(await taken(worker), text)
    assert (await call.result(WAIT)).text == text


async def test_a_result_is_found_although_the_first_read_failed(
    client: AsyncClient, other: AsyncClient, worker: FakeWorker, reconciling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repeated push of a finished call: Redis becomes unreachable before its record is read."""
    await other.submit("hi", id="c1")
    worker.finish(await taken(worker), "hello")
    look, fails = client._hash, [BrokerUnavailable("gone")]

    async def read(call_id: str) -> Any:
        if fails:
            raise fails.pop()
        return await look(call_id)

    monkeypatch.setattr(client, "_hash", read)
    asks = [client.submit("hi", id="c1"), client.submit("hi", id="c2")]
    again, fresh = await asyncio.wait_for(asyncio.gather(*asks), WAIT)
    assert (await again.result(WAIT)).text == "hello"
    worker.finish(await taken(worker), "bye")
    assert (await fresh.result(WAIT)).text == "bye"


# -- when Redis is away


async def test_a_wait_outlives_redis() -> None:
    folder = Path(f"/tmp/rsm-kill-{new_id()}")
    own = EmbeddedRedis(folder)
    settings = Settings(lease_ms=1500, tick_ms=50).with_redis(own.start())
    try:
        with routing(settings):
            async with AsyncClient(settings=settings) as client:
                await client.redis.config_set("appendfsync", "always")  # otherwise a kill may lose the last writes
                calls = [await client.submit(f"call {i}", stream=i == 0) for i in range(3)]
                own.kill()
                waits = [asyncio.create_task(c.result(WAIT)) for c in calls]
                chunks = asyncio.create_task(all_of(calls[0].stream()))
                late = asyncio.create_task(client.submit("late"))
                await asyncio.sleep(0)
                await asyncio.to_thread(own.start)
                with FakeWorker(settings).serving(echo):
                    assert [(await w).text for w in waits] == ["call 0", "call 1", "call 2"]
                    assert [p.text for p in await chunks] == ["call", "0"]
                    assert (await (await late).result(WAIT)).text == "late"
    finally:
        own.stop()
        shutil.rmtree(folder)


async def test_a_redis_that_never_answers_is_reported(tmp_path: Path) -> None:
    async with AsyncClient(f"unix://{tmp_path}/none", redis_timeout=0.05) as client:
        for ask in (client.submit("hi"), client.record("c1"), client.cancel("c1")):
            with pytest.raises(BrokerUnavailable, match="did not answer"):
                await ask
        assert not client._open


# -- waiting and closing


@pytest.mark.parametrize("steps", range(12))
async def test_close_catches_the_reader_at_any_step(settings: Settings, worker: FakeWorker, steps: int) -> None:
    """Before Python 3.12 a cancel that meets a finished send is swallowed by asyncio.wait_for, which redis-py uses."""
    client = AsyncClient(settings=settings)
    await client.submit("hi")
    worker.finish(await taken(worker))
    for _ in range(steps):
        await asyncio.sleep(0)
    async with asyncio.timeout(2):
        await client.close()


async def test_a_wait_that_takes_too_long_can_be_repeated(client: AsyncClient, worker: FakeWorker) -> None:
    call = await client.submit("hi")
    with pytest.raises(TimeoutError):
        await call.result(0.01)
    waiting = asyncio.create_task(call.result())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    worker.finish(await taken(worker), "hello")
    assert (await call.result(WAIT)).text == "hello", "a waiter that gave up takes nothing from others"


async def test_close_wakes_all_who_wait(settings: Settings, worker: FakeWorker) -> None:
    client = AsyncClient(settings=settings)
    calls = [await client.submit("hi", stream=i == 0) for i in range(3)]
    waits: list[asyncio.Task[Any]] = [asyncio.create_task(c.result()) for c in calls]
    waits.append(asyncio.create_task(all_of(calls[0].stream())))
    await asyncio.sleep(0.01)
    await client.close()
    async with asyncio.timeout(2):
        for wait in waits:
            with pytest.raises(BrokerUnavailable, match="closed"):
                await wait
    claimed = [await taken(worker) for _ in calls]
    assert {c.fence.call_id for c in claimed} == {c.id for c in calls}, "the calls continue"


async def test_close_ends_a_push_that_waits_for_redis(tmp_path: Path) -> None:
    client = AsyncClient(f"unix://{tmp_path}/none")
    pushes = [asyncio.create_task(client.submit(f"call {i}")) for i in range(3)]
    await asyncio.sleep(0.01)
    pushes.append(asyncio.create_task(client.submit("late")))
    await asyncio.sleep(0.01)
    await client.close()
    async with asyncio.timeout(2):
        for push in pushes:
            with pytest.raises(BrokerUnavailable, match="closed"):
                await push


async def test_a_closed_client_says_so(settings: Settings) -> None:
    client = AsyncClient(settings=settings)
    await client.submit("hi", id="c1")
    await client.close()
    await client.close()
    for ask in (
        client.submit("hi"),
        client.cancel("c1"),
        client.record("c1"),
        client.cancel_session("c1"),
        anext(client.stream("c1")),
    ):
        with pytest.raises(BrokerUnavailable, match="closed"):
            await ask
