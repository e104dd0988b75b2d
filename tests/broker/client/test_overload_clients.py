"""What producers see of an overloaded namespace: each client, both choices, many at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from rsm.broker import AsyncClient, BrokerUnavailable, Client, Overloaded, Settings
from rsm.broker.protocol import codec
from rsm.broker.protocol.keys import Keys
from rsm.workers.config import EngineConfig
from tests.support.fake_worker import FakeWorker, echo, patient, routing
from tests.support.waiting import eventually

WAIT = 20.0
ROOM = 3


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_open_calls": ROOM})


@pytest.fixture
def router(settings: Settings) -> Iterator[None]:
    with routing(patient(settings)):
        yield


@pytest.fixture
def full(client: Client) -> Client:
    """A client whose calls fill the namespace."""
    client.submit_many([client.prepare("hi", id=f"full{i}") for i in range(ROOM)])
    return client


def set_free(client: Client) -> None:
    for i in range(ROOM):
        client.cancel(f"full{i}")


# -- raise


def test_a_client_raises(full: Client) -> None:
    with pytest.raises(Overloaded, match="RSM_MAX_OPEN_CALLS") as caught:
        full.submit("a secret prompt", id="late")
    error = caught.value
    assert (error.bound, error.setting, error.retry_after) == ("open_calls", "RSM_MAX_OPEN_CALLS", 1.0)
    assert "secret" not in str(error)
    assert "late" not in full._open, "a refused call is not awaited"
    assert not full.redis.exists(full.keys.call("late"))
    set_free(full)
    assert full.submit("a secret prompt", id="late").id == "late"


async def test_an_async_client_raises(full: Client, settings: Settings) -> None:
    async with AsyncClient(settings=settings) as client:
        with pytest.raises(Overloaded) as caught:
            await client.submit("hi", id="late")
        assert caught.value.setting == "RSM_MAX_OPEN_CALLS"
        assert not client._open
        set_free(full)
        assert (await client.submit("hi", id="late")).id == "late"


def test_accepted_calls_stay_and_the_rest_can_be_submitted_again(
    client: Client, settings: Settings, router: None
) -> None:
    calls = [client.prepare(f"call {i}", id=f"c{i}") for i in range(ROOM + 2)]
    with pytest.raises(Overloaded) as caught:
        client.submit_many(calls)
    error = caught.value
    assert [h.id for h in error.accepted] == ["c0", "c1", "c2"]
    assert error.refused == calls[ROOM:]
    with FakeWorker(settings).serving(echo):
        assert [h.result(WAIT).text for h in error.accepted] == ["call 0", "call 1", "call 2"]
        assert [h.result(WAIT).text for h in client.submit_many(error.refused)] == ["call 3", "call 4"]


def test_calls_beyond_the_first_push_are_refused_too(client: Client) -> None:
    calls = [client.prepare("hi", id=f"c{i}") for i in range(100)]
    with pytest.raises(Overloaded) as caught:
        client.submit_many(calls)
    assert caught.value.refused == calls[ROOM:]


async def test_tasks_are_refused_one_by_one(settings: Settings) -> None:
    async with AsyncClient(settings=settings) as client:
        done = await asyncio.gather(*(client.submit("hi") for _ in range(ROOM + 2)), return_exceptions=True)
        assert [isinstance(d, Overloaded) for d in done] == [False] * ROOM + [True] * 2


# -- wait


def test_a_client_waits(full: Client, settings: Settings) -> None:
    with Client(settings=settings, on_overload="wait") as waiting, ThreadPoolExecutor(1) as pool:
        late = pool.submit(waiting.submit, "hi", id="late")
        time.sleep(0.1)
        assert not late.done()
        set_free(full)
        assert late.result(WAIT).id == "late"


async def test_an_async_client_waits(full: Client, settings: Settings) -> None:
    async with AsyncClient(settings=settings, on_overload="wait") as client:
        late = asyncio.create_task(client.submit("hi", id="late"))
        await asyncio.sleep(0.1)
        assert not late.done()
        set_free(full)
        assert (await late).id == "late"


def test_the_choice_is_per_submit(full: Client, settings: Settings) -> None:
    with Client(settings=settings, on_overload="wait") as waiting, pytest.raises(Overloaded):
        waiting.submit("hi", on_overload="raise")
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(full.submit, "hi", on_overload="wait")
        set_free(full)
        assert late.result(WAIT).id


def test_a_client_gives_up(full: Client, settings: Settings) -> None:
    with Client(settings=settings, on_overload="wait", overload_timeout=0.2) as waiting:
        began = time.monotonic()
        with pytest.raises(Overloaded):
            waiting.submit("hi")
        assert 0.2 <= time.monotonic() - began < 1.0


async def test_an_async_client_gives_up(full: Client, settings: Settings) -> None:
    async with AsyncClient(settings=settings, on_overload="wait", overload_timeout=0.2) as client:
        with pytest.raises(Overloaded):
            await client.submit("hi")


def test_no_submit_waits_beyond_a_deadline(full: Client, settings: Settings) -> None:
    with Client(settings=settings, on_overload="wait") as waiting:
        began = time.monotonic()
        with pytest.raises(Overloaded, match="deadline") as caught:
            waiting.submit("hi", deadline_ms=waiting.deadline_in(0.3))
    assert caught.value.retry_after == 0
    assert time.monotonic() - began < WAIT / 4


def test_close_ends_the_wait(full: Client, settings: Settings) -> None:
    waiting = Client(settings=settings, on_overload="wait")
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(waiting.submit, "hi")
        eventually(lambda: full.redis.hget(full.keys.usage, "refused"))
        waiting.close()
        with pytest.raises(BrokerUnavailable):
            late.result(0.9)  # before its next try


async def test_close_ends_the_wait_of_tasks(full: Client, settings: Settings) -> None:
    client = AsyncClient(settings=settings, on_overload="wait")
    late = asyncio.create_task(client.submit("hi"))
    await asyncio.sleep(0.1)
    await client.close()
    async with asyncio.timeout(0.8):
        with pytest.raises(BrokerUnavailable):
            await late


# -- many at once


class Watch(threading.Thread):
    """Reads the counter as often as it can, and keeps the maximum."""

    def __init__(self, db: redis.Redis, keys: Keys) -> None:
        super().__init__(name="watch")
        self.most, self.looks = 0, 0
        self._db: Any = db
        self._keys = keys
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, codec.number(self._db.hget(self._keys.usage, "open_calls")))
            self.looks += 1
            time.sleep(0.001)

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


@pytest.mark.parametrize("each", [1, 7])
def test_many_producers_stay_within_the_limit_and_all_finish(
    settings: Settings, db: redis.Redis, keys: Keys, router: None, each: int
) -> None:
    def produce(n: int) -> list[str]:
        with Client(settings=settings, on_overload="wait") as client:
            handles = []
            for at in range(0, 21, each):
                calls = [client.prepare(f"{n} {at + i}", session=f"s{n}") for i in range(each)]
                handles += client.submit_many(calls)
            return [h.result(WAIT).text for h in handles]

    with FakeWorker(settings).serving(echo), Watch(db, keys) as watch, ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(produce, range(6)))
    assert texts == [[f"{n} {i}" for i in range(21)] for n in range(6)]
    assert watch.looks > 10
    assert 0 < watch.most <= ROOM
    assert db.hmget(keys.usage, "open_calls", "open_bytes") == [b"0", b"0"]


async def test_many_tasks_stay_within_the_limit_and_all_finish(
    settings: Settings, db: redis.Redis, keys: Keys, router: None
) -> None:
    async with AsyncClient(settings=settings, on_overload="wait") as client:
        with FakeWorker(settings).serving(echo), Watch(db, keys) as watch:
            calls = await asyncio.gather(*(client.submit(f"call {i}") for i in range(60)))
            texts = [(await call.result(WAIT)).text for call in calls]
    assert texts == [f"call {i}" for i in range(60)]
    assert watch.most <= ROOM


# -- other ways to push


def test_a_bare_xadd_gets_a_failed_record(full: Client, db: redis.Redis, keys: Keys, router: None) -> None:
    db.xadd(keys.calls, {"id": "raw", "inbox": "box", "json": '{"prompt":"hi"}'})
    eventually(lambda: db.hget(keys.call("raw"), "state") == b"FAILED")
    assert db.hget(keys.call("raw"), "error_code") == b"overloaded"
    inbox: Any = db.xrange(keys.inbox("box"))
    ((_, event),) = inbox
    assert (event[b"state"], event[b"error_code"]) == (b"FAILED", b"overloaded")
    assert not db.xlen(keys.calls), "the stream continues after it"


async def test_the_manager_passes_the_choice_on(settings: Settings) -> None:
    from rsm.engine.manager import MultiEngineManager

    slow = EngineConfig(engine_id="e1", backend="sim", engine_args={"step_s": 10.0})
    manager = MultiEngineManager([slow], redis_url=settings.url(), settings=settings)
    async with manager:
        calls = [await manager.submit_request("s", "hi", {"max_tokens": 100}, request_id=f"c{i}") for i in range(ROOM)]
        with pytest.raises(Overloaded):
            await manager.submit_request("s", "hi")
        late = asyncio.create_task(manager.submit_request("s", "hi", on_overload="wait"))
        await asyncio.sleep(0.1)
        assert not late.done()
        for i in range(ROOM):
            await manager.cancel_request(f"c{i}")
        (await late).cancel()
        await asyncio.gather(*calls, return_exceptions=True)


# -- inboxes


def test_a_client_empties_its_inbox(
    settings: Settings, db: redis.Redis, keys: Keys, router: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsm.broker.client.inbox._BLOCK_S", 0.02)
    roomy = settings.model_copy(update={"max_open_calls": 0})
    with Client(settings=roomy) as client, FakeWorker(roomy).serving(echo):
        for handle in client.submit_many([client.prepare("hi") for _ in range(300)]):
            handle.result(WAIT)
        eventually(lambda: db.xlen(keys.inbox(client._inbox)) < 128, what="the inbox is trimmed")


async def test_an_async_client_empties_its_inbox(
    settings: Settings, db: redis.Redis, keys: Keys, router: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsm.broker.client.aio._BLOCK_S", 0.02)
    roomy = settings.model_copy(update={"max_open_calls": 0})
    async with AsyncClient(settings=roomy) as client:
        with FakeWorker(roomy).serving(echo):
            calls = await asyncio.gather(*(client.submit("hi") for _ in range(300)))
            await asyncio.gather(*(call.result(WAIT) for call in calls))
        async with asyncio.timeout(WAIT):
            while db.xlen(keys.inbox(client._inbox)) >= 128:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
