"""Admission in the real router: calls without headroom are throttled, shown and admitted; it helps modelled engines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from bench.programs.live.stack import Stack, drive, up
from rsm.broker import Client, RequestState, Settings
from rsm.broker.views.monitor import Monitor
from rsm.simulation.workload.programs import CallSpec, ProgramSpec, Segment
from rsm.workers.config import EngineConfig
from tests.support.fake_worker import FakeWorker, echo, patient, routing
from tests.support.waiting import eventually


@pytest.fixture
def admitting(settings: Settings) -> Settings:
    """The contexts of thinking programs decay at once, unless a test sets another half-life."""
    return patient(settings).model_copy(update={"admission": True, "admission_half_life_s": 0.001, "tick_ms": 20})


@pytest.fixture
def worker(admitting: Settings) -> Iterator[FakeWorker]:
    made = FakeWorker(admitting, kv_tokens=1000).up()
    yield made
    made.close()


def submit(client: Client, call_id: str, tokens: int, session: str = "", **options: object) -> None:
    client.submit("hi", id=call_id, session=session or f"of-{call_id}", prompt_tokens=tokens, **options)  # type: ignore[arg-type]


def state(monitor: Monitor, call_id: str) -> tuple[str, str]:
    record = monitor.call(call_id)
    return record.state.value, record.engine_id


def test_calls_without_headroom_wait_and_are_admitted(
    admitting: Settings, worker: FakeWorker, client: Client, monitor: Monitor
) -> None:
    with routing(admitting):
        submit(client, "c1", 600)
        eventually(lambda: state(monitor, "c1")[1] == "e1")
        submit(client, "c2", 600, session="s")
        eventually(lambda: monitor.throttled() == 1)
        assert "no engine has KV headroom for its context of 600 tokens" in monitor.call("c2").why
        assert [(c.request_id, c.where) for c in monitor.active_calls()] == [("c1", "queue"), ("c2", "throttled")]
        stats = monitor.stats()
        assert (stats["pending"], stats["throttled"], stats["ever_throttled"], stats["unaccounted"]) == (2, 1, 1, 0)
        assert monitor.engine("e1")["spoken_for"] == 600
        worker.finish(worker.take(), resident_tokens=620)
        worker.finish(worker.take_soon(), resident_tokens=620)
    assert monitor.call("c2").state is RequestState.COMPLETED
    assert (monitor.throttled(), monitor.stats()["unaccounted"]) == (0, 0)


def test_returning_calls_go_first(admitting: Settings, worker: FakeWorker, client: Client, monitor: Monitor) -> None:
    slow = admitting.model_copy(update={"admission_half_life_s": 60.0})
    with routing(slow):
        submit(client, "c1", 600, session="s")
        worker.finish(worker.take_soon(), resident_tokens=620)
        submit(client, "c2", 600)
        eventually(lambda: monitor.throttled() == 1)
        submit(client, "c3", 700, session="s")
        call = worker.take_soon()
        assert call.fence.call_id == "c3"
        assert monitor.throttled() == 1
        worker.finish(call, resident_tokens=720)
        client.cancel("c2")


def test_one_that_starves_gets_the_engine_for_itself(
    admitting: Settings, worker: FakeWorker, client: Client, monitor: Monitor, db: redis.Redis
) -> None:
    """A program of a late level is promoted while it is throttled, and the router places it with its new level."""
    admitting = admitting.model_copy(update={"starvation_beta": 1.0})
    with routing(admitting):
        submit(client, "first", 50, session="old")
        worker.finish(worker.take_soon(), service=5_000)
        submit(client, "c1", 600)
        running = worker.take_soon()
        submit(client, "old", 900, session="old")
        eventually(lambda: monitor.throttled() == 1)
        eventually(lambda: not db.exists(client.keys.held_starving("")), what="it has starved")
        submit(client, "new", 900, session="n")
        eventually(lambda: monitor.throttled() == 2)
        worker.finish(running)
        call = worker.take_soon()
        assert (call.fence.call_id, call.level) == ("old", 0)
        worker.finish(call)
        worker.finish(worker.take_soon())
    assert monitor.call("new").state is RequestState.COMPLETED


def test_a_router_without_admission_admits_all(
    admitting: Settings, worker: FakeWorker, client: Client, monitor: Monitor
) -> None:
    with routing(admitting):
        for n in range(4):
            submit(client, f"c{n}", 600)
        eventually(lambda: monitor.throttled() == 3)
    with routing(admitting.model_copy(update={"admission": False})):
        eventually(lambda: monitor.engine("e1")["queued"] == 4)
    for call in worker.claim() or ():
        worker.finish(call)


def test_throttled_calls_of_an_engine_that_dies_wait_for_the_next(
    settings: Settings, client: Client, monitor: Monitor
) -> None:
    quick = settings.model_copy(update={"admission": True, "tick_ms": 20})
    gone = FakeWorker(quick, kv_tokens=1000).up()
    with routing(quick):
        for n in range(4):
            submit(client, f"c{n}", 600)
        eventually(lambda: monitor.throttled() == 3)
        eventually(lambda: monitor.engine("e1")["state"] == "DEAD")
        eventually(lambda: monitor.throttled() == 0)
        with FakeWorker(quick, "e2", kv_tokens=1000).serving(echo):
            eventually(lambda: all(state(monitor, f"c{n}") == ("COMPLETED", "e2") for n in range(4)))
    gone.close()


def test_two_routers_and_many_programs(admitting: Settings, client: Client, monitor: Monitor) -> None:
    """Two engines, two routers, forty programs of three calls: new programs never overcommit the caches."""
    seen: list[int] = []

    def answer(worker: FakeWorker, call: object) -> None:
        seen.append(monitor.engine(worker.engine)["running"])
        worker.finish(call, resident_tokens=0)  # type: ignore[arg-type]

    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(routing(admitting))
        for engine in ("e1", "e2"):
            stack.enter_context(FakeWorker(admitting, engine, kv_tokens=1000).serving(answer))
        threads = [threading.Thread(target=program, args=(client, n)) for n in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    stats = monitor.stats()
    assert (stats["completed"], stats["throttled"], stats["pending"]) == (120, 0, 0)
    assert stats["ever_throttled"] > 0
    assert max(seen) <= 3, "of 300 tokens each"


def program(client: Client, n: int) -> None:
    for k in range(3):
        client.submit("hi", id=f"p{n}-{k}", session=f"p{n}", prompt_tokens=300).result(60)


# -- with modelled engines, as processes


def agent(name: int, context: int, calls: int) -> ProgramSpec:
    """A program whose context grows a little with each call, with a tool's time between calls."""
    prompt: tuple[Segment, ...] = (Segment(name * 100, context),)
    made = []
    for n in range(calls):
        answer = Segment(name * 100 + n + 1, 16)
        made.append(CallSpec(prompt, 16, answer.text, (n - 1,) if n else (), 0.05 if n else 0.0))
        prompt = (*prompt, answer)
    return ProgramSpec(f"p{name}", "agent", 0.0, tuple(made))


def hit_rate(tmp_path: Path, **settings: object) -> tuple[float, int]:
    """The fraction of prompt tokens found in the cache, and how many calls were throttled."""
    times = {"step_s": 0.004, "prefill_token_s": 2e-5, "decode_seq_s": 0.0, "context_token_s": 0.0}
    engine = EngineConfig(engine_id="e0", backend="sim", max_num_seqs=8, engine_args={**times, "kv_tokens": 2048})
    with up(Stack([engine], {"policy": "least_loaded", **settings}), tmp_path / "log") as found:
        runs = asyncio.run(drive(found, [agent(n, 480, 6) for n in range(1, 11)]))
        stats = Monitor(found).stats()
    assert all(run.ended_s is not None and not run.error for run in runs)
    assert (stats["completed"], stats["pending"], stats["unaccounted"]) == (60, 0, 0)
    return stats["cached_tokens"] / stats["prompt_tokens"], stats["ever_throttled"]


def test_programs_that_would_evict_each_other_take_turns(tmp_path: Path) -> None:
    """Ten programs of 500 tokens in a cache of 2048, as in tests/simulation/test_kv_admission.py, through Redis."""
    thrashing, none = hit_rate(tmp_path)
    orderly, throttled = hit_rate(tmp_path, admission=True, admission_half_life_s=0.5)
    assert (none, throttled > 0) == (0, True)
    assert orderly > thrashing + 0.2, (thrashing, orderly)
