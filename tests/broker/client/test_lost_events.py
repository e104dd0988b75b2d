"""Writes that Redis acknowledged and then lost, as a producer sees them; and WAIT, which prevents the loss."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from rsm.broker import AsyncClient, CallLost, Client, Delta, NotReplicated, Settings, UnknownCall
from rsm.broker.client import aio as aio_client
from rsm.broker.client import inbox
from rsm.broker.client import sync as sync_client
from rsm.broker.client.stream import BEGIN, FORGET, live
from rsm.broker.protocol.events import End
from tests.support.fake_worker import FakeWorker, patient, routing

_WAIT_S = 20.0


@pytest.fixture
def reconciling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients reconcile with Redis at once, not after five seconds."""
    monkeypatch.setattr(inbox, "RECONCILE_S", 0.0)
    for module in (sync_client, aio_client, inbox):
        monkeypatch.setattr(module, "_BLOCK_S", 0.05)


@pytest.fixture
async def aio(settings: Settings) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(settings=settings) as client:
        yield client


@pytest.fixture
def worker(settings: Settings) -> FakeWorker:
    worker = FakeWorker(patient(settings))
    worker.up()
    return worker


# -- calls


async def test_a_call_without_its_record_is_lost(reconciling: None, client: Client, aio: AsyncClient) -> None:
    handle, call = client.submit("hi", id="s"), await aio.submit("hi", id="a", stream=True)
    client.redis.delete(client.keys.call("s"), client.keys.call("a"), client.keys.calls)
    with pytest.raises(CallLost, match=r"call s\. .*Submit it again"):
        await asyncio.to_thread(handle.result, _WAIT_S)
    with pytest.raises(CallLost, match=r"call a\. "):
        await call.result(_WAIT_S)
    with pytest.raises(UnknownCall):
        [delta async for delta in call.stream()]
    again = client.submit("hi", id="s")
    assert client.record("s").state == "PENDING"
    assert not again.done


# -- WAIT


async def test_too_few_replicas_are_reported_and_the_call_is_pushed(
    settings: Settings, client: Client, aio: AsyncClient
) -> None:
    greedy = settings.model_copy(update={"wait_replicas": 9, "wait_ms": 20})
    with Client(settings=greedy) as sync:
        for _ in range(2):  # the second is a duplicate, and waits for replicas all the same
            with pytest.raises(NotReplicated, match="of 9 replicas") as caught:
                sync.submit("hi", id="s")
            assert caught.value.call_ids == ["s"]
        with pytest.raises(NotReplicated) as caught:
            sync.submit_many([sync.prepare("hi", id=f"m{i}") for i in range(3)])
        assert caught.value.call_ids == ["m0", "m1", "m2"]
    async with AsyncClient(settings=greedy) as other:
        errors = await asyncio.gather(*(other.submit("hi", id=f"a{i}") for i in range(3)), return_exceptions=True)
        assert [e.call_ids for e in errors if isinstance(e, NotReplicated)] == [["a0"], ["a1"], ["a2"]]
        assert set(other._open) == {"a0", "a1", "a2"}, "their ends are still awaited"
    assert all(client.record(i).state == "PENDING" for i in ("s", "m0", "m1", "m2", "a0", "a1", "a2"))


async def test_wait_survives_a_server_that_forgot_its_scripts(settings: Settings, client: Client) -> None:
    greedy = settings.model_copy(update={"wait_replicas": 9, "wait_ms": 20})
    client.redis.script_flush()
    with Client(settings=greedy) as sync, pytest.raises(NotReplicated):
        sync.submit("hi", id="s")
    async with AsyncClient(settings=greedy) as other:
        client.redis.script_flush()
        with pytest.raises(NotReplicated):
            await other.submit("hi", id="a")
    assert client.record("s").state == client.record("a").state == "PENDING"


# -- streams


def _words(deltas: list[Delta]) -> list[str]:
    return ["|" if delta.restart else delta.text for delta in deltas]


async def test_chunks_that_were_read_and_then_lost_are_delivered_again(
    settings: Settings, client: Client, aio: AsyncClient, worker: FakeWorker
) -> None:
    with routing(settings):
        call = await aio.submit("hi", id="c", stream=True)
        worker_call = await asyncio.to_thread(worker.take_soon)
    worker.publish(worker_call, *"abcd")
    live_stream, log_stream, sync_stream = call.stream(), aio.stream("c"), client.stream("c")
    heard = [[await anext(live_stream) for _ in "abcd"], [await anext(log_stream) for _ in "abcd"]]
    read = [next(sync_stream) for _ in "abcd"]
    assert _words(heard[0]) == _words(heard[1]) == _words(read) == list("abcd")
    # The state of a replica that lacks the latest two.
    lost = [delta.event_id for delta in read[2:]]
    client.redis.xdel(client.keys.events("c"), *lost)
    client.redis.hset(client.keys.call("c"), "events", 2)
    worker.publish(worker_call, *"xyz", first=2)
    worker.finish(worker_call, "abxyz")
    wanted = list("|abxyz")
    assert _words([d async for d in live_stream]) == wanted
    assert _words([d async for d in log_stream]) == wanted
    assert _words(list(sync_stream)) == wanted
    # A reader that comes back with a lost chunk starts over; one that comes back with an existing chunk resumes.
    assert _words(list(client.stream("c", lost[-1]))) == wanted
    assert _words([d async for d in aio.stream("c", lost[-1])]) == wanted
    assert _words(list(client.stream("c", read[1].event_id))) == list("xyz")


def _chunk(n: int, at: int) -> Delta:
    return Delta(n, f"{at}-0", str(at))


@pytest.mark.parametrize(
    ("events", "log", "delivered"),
    [
        ([0, 1, 2], [0, 1, 2], [0, 1, 2]),
        ([0, 0, 1, 0, 2], [0, 1, 2], [0, 1, 2]),  # events that come twice
        ([0, 2], [0, 1, 2], [0, 1, 2]),  # missing events
        ([], [0, 1, 2], [0, 1, 2]),
    ],
)
async def test_whatever_the_events_the_stream_is_the_log(
    events: list[int], log: list[int], delivered: list[int]
) -> None:
    queue: asyncio.Queue[Delta | End] = asyncio.Queue()
    for n in events:
        queue.put_nowait(_chunk(n, 100 + n))
    queue.put_nowait(End(len(log), None))

    async def read(last: str) -> list[Delta]:
        at = 0 if last == BEGIN else int(last.partition("-")[0])
        return [_chunk(n, 100 + n) for n in log if 100 + n > at]

    assert [d.n async for d in live(queue, read, lambda: True)] == delivered
    assert FORGET.restart
