"""Which waiting calls should move to an idle engine: the decision alone, then with a router and engines."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from math import inf
from statistics import fmean
from typing import Any

import pytest

from rsm.broker import Client, RequestState, Settings
from rsm.broker.client.handles import CallHandle
from rsm.broker.connection import execute
from rsm.broker.protocol import codec
from rsm.broker.protocol.snapshot import CacheUse, EngineView, SessionView, Speed
from rsm.broker.protocol.waiting_calls import WaitingCall
from rsm.router.admission import Admission
from rsm.router.cost_model import CostModel
from rsm.router.policies.cost import Cost
from rsm.router.views import CallView
from rsm.router.work_stealing.decision import Stealing, idle_and_loaded
from rsm.simulation.fleet import FleetConfig, SimFleet
from rsm.simulation.results import Results
from rsm.simulation.workload.programs import CallSpec, ProgramSpec, Segment
from rsm.workers.backends.sim.config import SimConfig
from tests.support.fake_worker import FakeWorker, patient, routing
from tests.support.sim_processes import Start, said
from tests.support.waiting import eventually

SPEED = Speed(0.01, 1e-4, 1e-5)


def engine(engine_id: str, **fields: Any) -> EngineView:
    return EngineView(engine_id, "READY", "m", **{"max_num_seqs": 4, "kv_tokens": 1_000_000, "speed": SPEED, **fields})


def loaded(engine_id: str = "a", queued: int = 8, **fields: Any) -> EngineView:
    return engine(engine_id, **{"running": 4, "queued": queued, **fields})


def queue(n: int = 8, where: str = "a", **fields: Any) -> list[WaitingCall]:
    rows = [WaitingCall(f"{where}{i}", "1-1", where, f"s{i}", "", 0, 0, 1000) for i in range(n)]
    return [row._replace(**fields) for row in rows]


def moved(
    engines: list[EngineView],
    waiting: list[WaitingCall],
    sessions: dict[str, SessionView] | None = None,
    admission: Admission | None = None,
) -> list[str]:
    idle, full = idle_and_loaded(engines)
    return [c.id for c in Stealing(CostModel(), admission).moves(idle, full, waiting, sessions or {})]


def with_cache(tokens: int, where: str = "a") -> SessionView:
    return SessionView(bound=where, resident={where: tokens}, used={where: CacheUse(1.0, 0)})


def test_an_idle_engine_takes_as_many_calls_as_it_has_slots() -> None:
    assert moved([loaded(queued=20), engine("b")], queue(20)) == ["a0", "a1", "a2", "a3"]
    assert moved([loaded(queued=20), engine("b", running=3)], queue(20)) == ["a0"]
    both = moved([loaded(queued=20), engine("b"), engine("c", running=2)], queue(20))
    assert both == [f"a{i}" for i in range(6)]


def test_without_idle_engines_or_waiting_calls_nothing_moves() -> None:
    assert moved([loaded(), engine("b", running=4)], queue()) == []
    assert moved([loaded(), engine("b", queued=1)], queue()) == [], "its slots are spoken for"
    assert moved([loaded(), replace(engine("b"), state="DRAINING")], queue()) == []
    assert moved([loaded(running=3), engine("b")], queue()) == [], "these will be claimed in a moment"


def test_a_call_that_need_not_wait_long_stays() -> None:
    """If it waits only a quarter of an answer's time, a move would save less than the error of the estimate."""
    fast = Speed(1e-4, 1e-6, 1e-7)
    assert moved([loaded(queued=2, speed=fast), engine("b", speed=fast)], queue(2)) == []


def test_the_cache_where_it_waits_keeps_a_call() -> None:
    """60,000 tokens take an idle engine 6 s, and 12 s with the tokens that they evict from its cache."""
    waiting = queue(4, prompt_tokens=60_000, reuse=59_900)
    engines = [loaded(queued=4), engine("b")]
    cached = {c.session: with_cache(59_900) for c in waiting}
    assert moved(engines, waiting, cached) == []
    assert moved(engines, queue(4, prompt_tokens=60_000))[:2] == ["a0", "a1"], "without the cache they move"
    on_both = {s: replace(v, resident={"a": 59_900, "b": 59_900}) for s, v in cached.items()}
    assert moved(engines, waiting, on_both), "the cache is there, too"


def test_the_reuse_that_was_expected_at_its_assignment_counts() -> None:
    """If a session has ended no call there yet, its calls are assumed to share a prefix with those that run."""
    waiting = queue(1, prompt_tokens=60_000)
    full = loaded(queued=1, running=4)
    assert moved([full, engine("b")], waiting) == ["a0"]
    assert moved([full, engine("b")], [waiting[0]._replace(reuse=59_900)]) == []


def test_of_a_long_queue_the_calls_move_that_save_time() -> None:
    waiting = queue(40)
    cached = {c.session: with_cache(900_000) for c in waiting[:2]}
    waiting[:2] = [c._replace(prompt_tokens=900_100) for c in waiting[:2]]
    assert moved([loaded(queued=40), engine("b", running=2)], waiting, cached) == ["a2", "a3"]


def test_how_long_a_call_still_waits_follows_from_its_place() -> None:
    """All would have to compute 6 s again, so the first ones start sooner where they are."""
    waiting = queue(40, prompt_tokens=60_000, reuse=59_900)
    cached = {c.session: with_cache(59_900) for c in waiting}
    full = loaded(queued=40, prefill_s=0.0, running=4)
    found = moved([full, engine("b", max_num_seqs=1)], waiting, cached)
    assert len(found) == 1
    assert 10 < int(found[0][1:]) < 35
    bound = {s: replace(view, bound="b") for s, view in cached.items()}
    assert moved([full, engine("b", max_num_seqs=1)], waiting, bound) == found, "a binding alone is no cache"


def test_better_calls_go_first_whichever_engine_they_wait_for() -> None:
    urgent = queue(1, "c", priority=-1, id="urgent")
    waiting = [*queue(30, level=2), *urgent, *queue(30, "c", level=1)]
    found = moved([loaded(queued=30), loaded("c", 31), engine("b")], waiting)
    assert found == ["urgent", "c0", "c1", "c2"]


def test_a_call_goes_only_where_its_model_is() -> None:
    other = replace(engine("b"), model="n")
    full = loaded(queued=20)
    assert moved([full, other], queue(20, model="m")) == []
    assert moved([full, other], queue(20, model="n")) == ["a0", "a1", "a2", "a3"]
    assert moved([full, other], queue(20)) == ["a0", "a1", "a2", "a3"], "they may go to any engine"


def test_the_idle_engines_cache_must_have_headroom() -> None:
    assert moved([loaded(), engine("b", kv_tokens=10_000, kv_usage=0.95)], queue()) == []
    assert moved([loaded(), engine("b", kv_tokens=10_000, kv_usage=0.85)], queue()) == ["a0"]


def test_a_call_moves_a_few_times_at_most() -> None:
    assert len(moved([loaded(), engine("b")], queue(moves=2))) == 4
    assert moved([loaded(), engine("b")], queue(moves=3)) == []


def test_an_engine_that_comes_up_is_not_waited_for() -> None:
    waiting = queue(2, prompt_tokens=60_000)
    starting = loaded(queued=2, running=0, max_num_seqs=4)
    cached = {c.session: with_cache(59_900) for c in waiting}
    assert moved([replace(starting, state="STARTING"), engine("b")], waiting, cached) == ["a0", "a1"]


def test_admission_has_a_say() -> None:
    crowded = engine("b", kv_tokens=100_000, spoken_for=(100_000.0,))
    assert moved([loaded(), crowded], queue(), admission=Admission()) == []
    assert len(moved([loaded(), crowded], queue())) == 4


@pytest.mark.parametrize("speed", [SPEED, None])
def test_the_policy_then_chooses_the_idle_engine(speed: Speed | None) -> None:
    """Otherwise the call would go back to the loaded engine."""
    policy = Cost(Settings())
    engines = [loaded(queued=4, speed=speed), engine("b", speed=speed)]
    waiting = queue(4)
    model = policy.cost_model()
    chosen = Stealing(model).moves(*idle_and_loaded(engines), waiting, {})
    assert chosen
    assert policy.choose(CallView("s0", "", 1000), engines, SessionView()).engine == "b"


# -- routers and engines that do it


def submit(client: Client, count: int, max_tokens: int) -> dict[str, CallHandle]:
    prompts = [f"prompt number {i}" for i in range(count)]
    return {p: client.submit(p, session=f"s{i}", max_tokens=max_tokens) for i, p in enumerate(prompts)}


def cost(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update={"policy": "cost", **changes})


def stat(client: Client, name: str) -> int:
    return codec.number(client.redis.hget(client.keys.stats, name))


@pytest.mark.parametrize("routers", [1, 3])
def test_an_engine_that_comes_later_takes_what_waits_for_another(
    client: Client, settings: Settings, start: Start, routers: int
) -> None:
    """Each call is answered once, whichever engine had it first, even if several routers steal at the same time."""
    with ExitStack() as stack:
        for _ in range(routers):
            stack.enter_context(routing(cost(settings)))
        start("e1", step_s=0.02, max_num_seqs=2)
        calls = submit(client, 24, 30)
        queue = client.keys.queue("e1")
        eventually(lambda: client.redis.zcard(queue) + client.redis.zcard(client.keys.running("e1")) >= 20)
        start("e2", step_s=0.02, max_num_seqs=2)
        for call in calls.values():
            call.wait(60)
    ended = {p: c.record() for p, c in calls.items()}
    assert all(r.state is RequestState.COMPLETED and r.result for r in ended.values())
    assert {p: r.result.text for p, r in ended.items() if r.result} == {p: said(p, 30) for p in calls}
    moved = [r for r in ended.values() if r.stolen_from]
    assert len(moved) >= 4
    assert {r.stolen_from[0] for r in moved} == {"e1"}
    assert len([r for r in moved if r.engine_id == "e2" and next(iter(r.costs)) == "e2"]) >= 4, (
        "with the costs at that time"
    )
    assert stat(client, "stolen") == sum(len(r.stolen_from) for r in ended.values())
    assert stat(client, "completed") == len(calls)
    assert not client.redis.exists(client.keys.work("e1"), client.keys.work("e2"))
    assert {r.attempt for r in ended.values()} == {1}
    sessions = {r.session_id: codec.text(client.redis.hget(client.keys.session(r.session_id), "engine")) for r in moved}
    assert sessions == {r.session_id: r.engine_id for r in moved}, "bound again"


@pytest.mark.parametrize(
    ("changes", "taken"),
    [({}, 1), ({"stealing": False}, 0), ({"policy": "least_loaded"}, 0)],
    ids=["on", "off", "no costs"],
)
def test_nothing_is_taken_if_stealing_is_off_or_the_policy_has_no_costs(
    client: Client, settings: Settings, changes: dict[str, Any], taken: int
) -> None:
    busy, free = (FakeWorker(patient(settings), e, max_num_seqs=1) for e in ("e1", "e2"))
    busy.up()
    with routing(cost(patient(settings), **changes)):
        for i in range(6):
            client.submit("hi", id=f"c{i}", prompt_tokens=10)
        eventually(lambda: client.redis.zcard(client.keys.queue("e1")) == 6)
        busy.take()
        free.up()
        time.sleep(6 * settings.tick_ms / 1000)
    assert client.redis.zcard(client.keys.queue("e1")) == 5 - taken
    assert client.redis.zcard(client.keys.queue("e2")) == taken, "it waits there now, so the engine is no longer idle"
    assert stat(client, "stolen") == taken


def test_a_drained_engine_is_left_and_its_session_bound_again(client: Client, settings: Settings) -> None:
    """So is a dead one. A session's cache lowers the cost of its engine, but does not tie the session to it."""
    first, second = (FakeWorker(patient(settings), e) for e in ("e1", "e2"))
    first.up()
    with routing(cost(patient(settings))):
        bound = client.keys.session("s")
        client.submit("hi", id="c1", session="s", prompt_tokens=3000)
        first.finish(first.take_soon(), prompt_tokens=3000, resident_tokens=3005)
        assert client.redis.hget(bound, "engine") == b"e1"
        second.up()
        assert client.result("c1", 20)
        client.submit("hi", id="c2", session="s", prompt_tokens=3050)
        first.finish(first.take_soon(), prompt_tokens=3050, resident_tokens=3055)
        assert client.record("c2").reuse > 2900, "it comes back for its cache"
        execute.run(client.redis, first.transitions.drain("e1"))
        client.submit("hi", id="c3", session="s", prompt_tokens=3100)
        second.finish(second.take_soon(), prompt_tokens=3100, resident_tokens=3105)
        assert client.redis.hget(bound, "engine") == b"e2"
        execute.run(client.redis, second.transitions.reap("e2", second.incarnation))
        third = FakeWorker(patient(settings), "e3").up()
        client.submit("hi", id="c4", session="s", prompt_tokens=3150)
        third.take_soon()
        assert client.redis.hget(bound, "engine") == b"e3"


# -- fleets in virtual time


def skewed(n: int = 128) -> list[ProgramSpec]:
    """Every other call is long, so one engine gets all the long calls."""
    return [
        ProgramSpec(f"p{i}", "call", 0.001 * i, (CallSpec((Segment(i + 1, 300),), 10 if i % 2 else 600),))
        for i in range(n)
    ]


def simulate(programs: list[ProgramSpec], slots: int, **settings: Any) -> Results:
    sim = SimConfig(max_num_seqs=slots)
    return SimFleet(FleetConfig(engines=2, sim=sim, policy="cost", settings=Settings(**settings))).run(programs)


def mean_response(results: Results) -> float:
    return fmean(p.response_s or inf for p in results.programs)


@pytest.mark.parametrize("admission", [False, True])
def test_a_skewed_load_ends_sooner(admission: bool) -> None:
    with_it, without = (simulate(skewed(), 8, stealing=on, admission=admission) for on in (True, False))
    assert not with_it.unfinished
    assert not without.unfinished
    assert with_it.until_s < 0.75 * without.until_s
    assert mean_response(with_it) < 0.75 * mean_response(without)
    moves = [c.moves for c in with_it.calls]
    assert sum(moves) > 10
    assert max(moves) <= 3
    assert not any(c.moves for c in without.calls)


def test_without_waiting_calls_figures_are_the_same() -> None:
    def figures(stealing: bool) -> Any:
        results = simulate(skewed(), 64, stealing=stealing)
        return results.until_s, [(p.ended_s, p.calls) for p in results.programs]

    assert figures(True) == figures(False)
