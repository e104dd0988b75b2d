"""A full engine that preempts: what its worker claims, and when."""

from __future__ import annotations

import time

import pytest

from rsm.broker import Client, RequestState, Settings
from rsm.broker.views.monitor import Monitor
from rsm.workers.runtime.claimer import Slots
from tests.support.fake_worker import routing
from tests.support.sim_processes import Start, said
from tests.support.waiting import eventually

_SLOTS = 2
_STEP_S = 0.005


def grow_old(client: Client, monitor: Monitor, session: str) -> None:
    """Gives a program so much service that its next call is in a worse level."""
    client.submit("so much has been said", session=session, max_tokens=600).wait(30)
    eventually(lambda: monitor.session(session)["level"] == 1)


@pytest.mark.parametrize("scheduler", ["plas", "priority"])
def test_a_short_program_passes_long_ones_that_fill_the_engine(
    settings: Settings, client: Client, start: Start, monitor: Monitor, scheduler: str
) -> None:
    """All slots and the two prefetched claims are taken; without `plas` the short call would wait in Redis."""
    start(max_num_seqs=_SLOTS, step_s=_STEP_S, scheduler=scheduler)
    with routing(settings):
        grow_old(client, monitor, "old")
        long = [client.submit(f"tell {i}", session="old", max_tokens=2000) for i in range(_SLOTS + 3)]
        eventually(lambda: monitor.engine("e1")["running"] == _SLOTS + 2)
        short = client.submit("be brief", session="new", max_tokens=5)
        if scheduler == "priority":
            time.sleep(1.5)
            assert short.record().state is RequestState.PENDING
        else:
            record = short.wait(5)
            assert record.result is not None
            assert record.result.text == said("be brief", 5)
            assert monitor.engine("e1")["running"] >= _SLOTS, "the others still run"
        assert not [c for c in long if c.record().state.terminal]
        for call in [*long, short]:
            call.cancel()
        eventually(lambda: monitor.engine("e1")["running"] == 0)
        again = [client.submit("once more", session="new", max_tokens=5) for _ in range(_SLOTS + 3)]
        assert {call.wait(10).state for call in again} == {RequestState.COMPLETED}


def test_a_preempted_call_gives_the_same_answer(
    settings: Settings, client: Client, start: Start, monitor: Monitor
) -> None:
    start(max_num_seqs=1, step_s=_STEP_S, scheduler="plas")
    with routing(settings):
        grow_old(client, monitor, "old")
        long = client.submit("a long story", session="old", stream=True, max_tokens=400)
        eventually(lambda: long.record().state is RequestState.RUNNING)
        for i in range(4):
            client.submit(f"{i}", session=f"new{i}", max_tokens=3).wait(5)
        record = long.wait(20)
        assert record.result is not None
        assert record.result.text == said("a long story", 400)
        assert "".join(p.text for p in long.stream()) == said("a long story", 400)


def test_a_full_engine_claims_at_once_when_a_call_ends(settings: Settings, client: Client, start: Start) -> None:
    """The claimer sleeps then; it is woken before its sleep ends."""
    start(max_num_seqs=_SLOTS, step_s=_STEP_S, scheduler="plas")
    with routing(settings):
        client.submit("warm up", max_tokens=1).wait(20)
        began = time.monotonic()
        calls = [client.submit(f"number {i}", session=f"s{i}", max_tokens=4) for i in range(60)]
        for call in calls:
            assert call.wait(30).state is RequestState.COMPLETED
        assert time.monotonic() - began < 10


def test_slots_report_when_the_claimer_must_be_woken() -> None:
    slots = Slots(3)
    assert not slots.release(-3)
    assert slots.fall_asleep()
    slots.take(1)  # a better call took a slot
    assert not slots.release(), "still full"
    assert slots.release(), "asleep, and a slot is free"
    assert not slots.release(), "woken already"
    assert not slots.fall_asleep()
    slots.take(2)
    slots.close()
    assert not slots.fall_asleep()
