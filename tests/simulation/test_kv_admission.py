"""Admission in virtual time: the rules of residents.lua, with programs whose contexts exceed the cache."""

from __future__ import annotations

from collections.abc import Sequence

from rsm.broker.settings import Settings
from rsm.simulation.fleet import FleetConfig, SimFleet
from rsm.simulation.results import Results
from rsm.simulation.workload.programs import CallSpec, ProgramSpec, Segment
from rsm.workers.backends.sim.engine import SimConfig

ON = Settings(admission=True, policy="least_loaded")
OFF = Settings(policy="least_loaded")


def agent(name: int, context: int, calls: int, arrival_s: float = 0.0, delay_s: float = 1.0) -> ProgramSpec:
    """A program whose context grows a little with each call, with tool time between calls."""
    prompt: tuple[Segment, ...] = (Segment(name * 1000, context),)
    made: list[CallSpec] = []
    for n in range(calls):
        prompt = (*prompt, Segment(name * 1000 + 2 * n + 1, 50))
        answer = Segment(name * 1000 + 2 * n + 2, 20)
        made.append(CallSpec(prompt, 20, answer.text, (n - 1,) if n else (), delay_s if n else 0.0))
        prompt = (*prompt, answer)
    return ProgramSpec(f"p{name}", "agent", arrival_s, tuple(made))


def run(settings: Settings, programs: Sequence[ProgramSpec], engines: int = 1) -> Results:
    sim = SimConfig(kv_tokens=100_000, max_model_len=100_000)
    config = FleetConfig(engines=engines, sim=sim, policy=settings.policy, settings=settings)
    return SimFleet(config).run(programs)


def test_programs_that_would_evict_each_other_take_turns() -> None:
    crowd = [agent(n, 20_000, 10) for n in range(1, 17)]
    thrashing, orderly = run(OFF, crowd), run(ON, crowd)
    assert not orderly.unfinished
    assert orderly.hit_rate > thrashing.hit_rate + 0.3
    assert orderly.until_s < thrashing.until_s


def test_a_call_that_fits_goes_before_one_that_does_not() -> None:
    running, large, small = agent(1, 60_000, 1), agent(2, 90_000, 1, arrival_s=0.1), agent(3, 5_000, 1, arrival_s=0.2)
    ended = [p.ended_s or 0.0 for p in run(ON, [running, large, small]).programs]
    assert ended[2] < ended[1]


def test_with_enough_headroom_no_call_waits() -> None:
    few = [agent(n, 5_000, 6) for n in range(1, 9)]
    assert [p.ended_s for p in run(ON, few).programs] == [p.ended_s for p in run(OFF, few).programs]


def test_no_size_of_program_starves() -> None:
    """A large program among many small ones waits before each call at most about beta times as long as it ran."""
    small = [agent(n, 4_000, 4, arrival_s=0.2 * n) for n in range(2, 200)]
    results = run(ON.model_copy(update={"starvation_beta": 2.0}), [agent(1, 80_000, 3, arrival_s=5.0), *small])
    assert not results.unfinished
    large = next(p for p in results.programs if p.spec.id == "p1")
    ran = 0.0
    for call in large.calls:
        assert call.claimed_s is not None
        assert call.ended_s is not None
        assert call.claimed_s - call.ready_s < 2.0 * max(1.0, ran) + 60.0
        ran += call.ended_s - call.claimed_s


def test_equal_seeds_give_equal_runs() -> None:
    crowd = [agent(n, 20_000, 5) for n in range(1, 12)]
    first, second = run(ON, crowd, engines=2), run(ON, crowd, engines=2)
    assert [p.ended_s for p in first.programs] == [p.ended_s for p in second.programs]
    assert {c.engine for c in first.calls} == {"e0", "e1"}
