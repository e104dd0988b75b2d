"""The pure core of program-aware scheduling inside an engine (`plas.py`)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from math import inf

import pytest

from rsm.workers.scheduling.plas import Order, Plas, PlasCall, PlasRules

RULES = PlasRules(bounds=(10, 30, 100), beta=4.0, floor_s=1.0)


def arrived(plas: Plas, *, inherited: float = 0, priority: int = 0, at: float = 0.0, ran: float = 0.0) -> PlasCall:
    return plas.add("p", arrival=at, priority=priority, inherited=inherited, ran_s=ran)


@pytest.mark.parametrize(("service", "level"), [(0, 0), (9, 0), (10, 1), (29, 1), (30, 2), (100, 3), (1e9, 3)])
def test_a_call_begins_in_the_level_of_its_program(service: float, level: int) -> None:
    assert arrived(Plas(RULES), inherited=service).level == level == RULES.level_of(service)


def test_the_level_is_the_bin_of_inherited_plus_own_service() -> None:
    dice = random.Random(7)
    for _ in range(300):
        plas, inherited = Plas(RULES), dice.choice([0, 3, 10, 25, 90, 1000])
        call = arrived(plas, inherited=inherited)
        for _ in range(20):
            before, left = call.level, plas.until_demotion(call)
            units = dice.choice([1, 2, 5, 40, 500])
            fell = plas.charge(call, units)
            assert fell == (units >= left) == (call.level > before)
            assert call.level == RULES.level_of(inherited + call.own)
        assert call.level < 3 or plas.until_demotion(call) == inf


def test_a_step_computes_a_chunk_of_a_worse_calls_prompt_while_a_better_one_runs() -> None:
    rules = PlasRules(prompt_chunk=512)
    assert rules.prompt_tokens(8192, better_runs=True) == 512
    assert rules.prompt_tokens(8192, better_runs=False) == 8192
    assert rules.prompt_tokens(256, better_runs=True) == 256
    assert PlasRules(prompt_chunk=0).prompt_tokens(8192, better_runs=True) == 8192
    with pytest.raises(ValueError, match="prompt_chunk"):
        PlasRules(prompt_chunk=-1)


def test_quanta_may_differ_from_the_bins() -> None:
    plas = Plas(PlasRules(bounds=(10, 30), quanta=(4, 6)))
    call = arrived(plas, inherited=15)
    assert (call.level, plas.until_demotion(call)) == (1, 6)
    assert not plas.charge(call, 5)
    assert plas.charge(call, 1)
    assert call.level == 2
    fresh = arrived(plas)
    assert plas.charge(fresh, 10)  # the excess over one level is charged to the next
    assert fresh.level == 2


def test_a_call_may_begin_in_another_level() -> None:
    """It was promoted while it waited elsewhere, or only its level is known."""
    plas = Plas(RULES)
    promoted = plas.add("p", arrival=0, inherited=50, level=0)
    assert (promoted.level, plas.until_demotion(promoted)) == (0, 10)
    unknown = plas.add("p", arrival=0, level=2)
    assert (unknown.level, plas.until_demotion(unknown)) == (2, 70)
    assert plas.add("p", arrival=0, level=9).level == 3


def test_class_goes_before_level_before_arrival_before_number() -> None:
    plas = Plas(RULES)
    urgent = arrived(plas, priority=1, inherited=500, at=9)
    first, second = arrived(plas, priority=2, at=3), arrived(plas, priority=2, at=3)
    late = arrived(plas, priority=2, at=5)
    worn = arrived(plas, priority=2, inherited=10, at=0)
    calls = [worn, late, second, first, urgent]
    assert sorted(calls, key=lambda c: c.order) == [urgent, first, second, late, worn]


def test_a_starving_call_moves_to_the_best_level_and_its_counters_are_reset() -> None:
    plas = Plas(RULES)
    call = plas.add("p", arrival=0, priority=3, inherited=100, waited_s=2, ran_s=5)
    assert plas.next_promotion() == 18  # (2 + 18) / 5 = 4
    assert plas.promote(17.9) == []
    assert plas.promote(18) == [call]
    assert (call.priority, call.level, call.promotions, plas.until_demotion(call)) == (3, 0, 1, 10)
    assert plas.next_promotion() == inf
    plas.start(call, 20)
    plas.charge(call, 12)
    assert call.level == 1
    plas.stop(call, 23)
    assert plas.next_promotion() == 33  # waited 2 s and ran 3 s since the promotion: (2 + 10) / 3 = 4


def test_waiting_is_summed_over_the_times_without_a_slot() -> None:
    plas = Plas(RULES)
    call = arrived(plas, inherited=10)
    plas.start(call, 1.5)
    assert plas.next_promotion() == inf
    plas.stop(call, 2.0)  # ran 0.5 s, which counts as the floor of 1 s: starves after 4 s of waiting, 1.5 s have passed
    assert plas.next_promotion() == 4.5
    plas.end(call)
    assert plas.next_promotion() == inf
    assert plas.promote(100) == []


def test_the_program_counts_not_only_the_call() -> None:
    """A call of a program that ran long is promoted later than one of a program that only waited."""
    plas = Plas(RULES)
    patient = plas.add("long", arrival=0, inherited=100, waited_s=0, ran_s=50)
    wronged = plas.add("short", arrival=0, inherited=10, waited_s=30, ran_s=2)
    assert plas.promote(0) == [wronged]
    assert plas.promote(199) == []
    assert plas.promote(200) == [patient]


def test_a_program_that_starved_once_is_not_promoted_on_every_call() -> None:
    plas = Plas(RULES)
    call = plas.add("p", arrival=0, inherited=10, waited_s=100, ran_s=1)
    promotions, now = 0, 0.0
    for _ in range(1000):  # demoted and preempted as often as possible
        promotions += len(plas.promote(now))
        plas.start(call, now)
        plas.charge(call, 10)
        plas.stop(call, now)
        now += 0.01
    assert promotions <= 1 + now / (RULES.beta * RULES.floor_s)


def test_ended_calls_are_removed_from_the_heap() -> None:
    """Even if all of them would have starved far in the future."""
    plas = Plas(RULES)
    for i in range(5000):
        call = plas.add("p", arrival=i, inherited=10, ran_s=1e6)
        plas.start(call, i)
        plas.end(call)
    assert len(plas._starving) < 200
    assert plas._watched == 0


def test_beta_zero_promotes_no_call() -> None:
    plas = Plas(PlasRules(bounds=(10,), beta=0))
    arrived(plas, inherited=10)
    assert plas.next_promotion() == inf


# -- victims


def test_only_strictly_worse_running_calls_are_preempted() -> None:
    plas = Plas(RULES)
    best, equal, worse, worst = (arrived(plas, inherited=s) for s in (0, 10, 30, 100))
    waiting = [arrived(plas), arrived(plas, inherited=10), arrived(plas, inherited=10)]
    assert plas.victims(waiting, [best, equal, worse, worst], 0) == [worst, worse]
    assert plas.victims(waiting, [best, equal], 0) == [equal]
    assert plas.victims(waiting, [best, equal, worse, worst], 1) == [worst, worse]  # one of three has a free slot
    assert plas.victims(waiting[1:], [best, equal], 0) == []
    assert plas.victims(waiting, [best, equal, worse, worst], 3) == []
    assert plas.victims([], [worst], 0) == []
    assert plas.victims(waiting, [], 0) == []


def test_a_class_is_worse_than_any_level_of_a_better_one() -> None:
    plas = Plas(RULES)
    running = [arrived(plas, priority=1, inherited=1000)]
    assert plas.victims([arrived(plas, priority=2)], running, 0) == []
    assert plas.victims([arrived(plas, priority=0, inherited=1000)], running, 0) == running


def test_victims_of_a_step_are_limited() -> None:
    plas = Plas(PlasRules(bounds=(10,), most_victims=2))
    running = [arrived(plas, inherited=10) for _ in range(5)]
    assert len(plas.victims([arrived(plas) for _ in range(5)], running, 0)) == 2
    assert len(plas.victims_to_free(arrived(plas), running, 4, lambda _: 1)) == 2


def test_no_call_is_preempted_in_vain() -> None:
    plas = Plas(RULES)
    best, worse, worst = (arrived(plas, inherited=s) for s in (0, 30, 100))
    running, call = [best, worse, worst], arrived(plas)
    assert plas.victims_to_free(call, running, 3, lambda _: 4) == [worst]
    assert plas.victims_to_free(call, running, 8, lambda _: 4) == [worst, worse]
    assert plas.victims_to_free(call, running, 9, lambda _: 4) == []
    assert plas.victims_to_free(call, running, 0, lambda _: 4) == []
    assert plas.victims_to_free(call, running, 3, lambda c: 4 if c is worse else 0) == [worse]


@pytest.mark.parametrize(
    "wrong",
    [
        {"bounds": (10, 10)},
        {"bounds": (20, 10)},
        {"bounds": (0, 10)},
        {"bounds": (10,), "quanta": (1, 2)},
        {"bounds": (10,), "quanta": (0,)},
        {"beta": -1.0},
        {"beta": inf},
        {"floor_s": 0.0},
        {"most_victims": -1},
    ],
)
def test_invalid_rules(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        PlasRules(**wrong)  # type: ignore[arg-type]


# -- a small engine: each step gives every running call one unit


@dataclass
class Program:
    calls: list[int]
    service: int = 0
    waited: int = 0
    left: int = 0
    call: PlasCall | None = field(default=None, repr=False)


def _order(program: Program) -> Order:
    assert program.call is not None
    return program.call.order


def simulated(plas: Plas, programs: list[Program], slots: int, most_steps: int = 10_000) -> int:
    """The total of the steps that the programs waited until all were done; FCFS if the rules have one level."""
    now, exchanges = 0, 0
    running: list[Program] = []
    while now < most_steps:
        for p in programs:
            if p.call is None and p.calls:
                p.call, p.left = plas.add("p", arrival=now, inherited=p.service), p.calls.pop(0)
        if not (alive := [p for p in programs if p.call is not None]):
            return sum(p.waited for p in programs)
        plas.promote(now)
        waiting = sorted((p for p in alive if p not in running), key=_order)
        running.sort(key=_order)
        free = slots - len(running)
        out = plas.victims([p.call for p in waiting if p.call], [p.call for p in running if p.call], free)
        for p in [p for p in running if p.call in out]:
            assert p.call is not None
            plas.stop(p.call, now)
            running.remove(p)
            exchanges += 1
        for p in waiting[: slots - len(running)]:
            assert p.call is not None
            plas.start(p.call, now)
            running.append(p)
        now += 1
        for p in alive:
            p.waited += p not in running
        for p in list(running):
            assert p.call is not None
            plas.charge(p.call, 1)
            p.left -= 1
            if not p.left:
                p.service += int(p.call.own)
                plas.end(p.call)
                running.remove(p)
                p.call = None
    raise AssertionError("not done in time")


def test_the_papers_example_waits_less_than_first_come_first_served() -> None:
    """Figure 2 of the paper: four programs of sequential calls, two slots. FCFS waits 18 steps in total."""
    waits = {
        name: simulated(Plas(rules), [Program([*calls]) for calls in ([4, 3, 1, 1], [3, 3, 4], [1, 2], [4])], 2)
        for name, rules in {
            "fcfs": PlasRules(bounds=(), beta=0),
            "plas": PlasRules(bounds=(2, 4, 8, 16, 32, 64), beta=0),
        }.items()
    }
    assert waits["fcfs"] == 18
    assert waits["plas"] < waits["fcfs"]


def test_no_program_starves_under_a_stream_of_short_programs() -> None:
    """One slot, and always a new program that is better: without promotion the long one never progresses."""

    def steps_to_finish(beta: float) -> int:
        plas = Plas(PlasRules(bounds=(5, 10), beta=beta, floor_s=1.0))
        long, left, now, running = plas.add("long", arrival=0, inherited=50), 20, 0, False
        while left and now < 5000:
            plas.promote(now)
            fresh = plas.add("short", arrival=now)  # a new one each step, one step long
            if running and plas.victims([fresh], [long], 0):
                plas.stop(long, now)
                running = False
            elif not running and long.order < fresh.order:
                plas.start(long, now)
                running = True
            plas.end(fresh)
            now += 1
            if running:
                plas.charge(long, 1)
                left -= 1
        return now

    assert steps_to_finish(0) == 5000
    assert steps_to_finish(4.0) < 20 * (4 + 1) * 2


def test_exchanges_are_limited() -> None:
    """Calls of one level never take turns: each exchange costs a call a level."""
    dice = random.Random(3)
    rules = PlasRules(bounds=(4, 8, 16), beta=0)
    plas, stops = Plas(rules), 0
    real = plas.stop

    def counted(call: PlasCall, now: float) -> None:
        nonlocal stops
        stops += 1
        real(call, now)

    plas.stop = counted  # type: ignore[method-assign]
    programs = [Program([dice.randint(1, 12) for _ in range(dice.randint(1, 6))]) for _ in range(30)]
    calls = sum(len(p.calls) for p in programs)
    simulated(plas, programs, 4)
    assert 0 < stops <= calls * (len(rules.bounds) + 1)
