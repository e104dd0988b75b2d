"""Cases for the scheduler plug-in with the real Scheduler class of each vLLM version. Run in a process per version.

`python -m tests.support.vllm.scheduler_cases` prints a JSON object: the version, and for each case an empty string or
the error.
"""

from __future__ import annotations

import inspect
import json
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from bench.vllm import miniature as mini
from bench.vllm.miniature import Call, Engine
from rsm.workers.scheduling import vllm_plugin as vllm_scheduler
from rsm.workers.scheduling.plas import PlasRules
from rsm.workers.scheduling.program import LEVELS
from rsm.workers.scheduling.service import create_unit
from rsm.workers.scheduling.vllm_plugin import make_scheduler

SEEDS = range(6)
BOUNDS = (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)  # of the settings
_STEP_S = 0.02


def engine(asynchronous: bool, **more: Any) -> Engine:
    """An engine with the plug-in. Its clock counts steps."""
    found = mini.make_engine(make_scheduler, asynchronous=asynchronous, **more)
    vllm_scheduler.monotonic = lambda: found.steps * _STEP_S  # type: ignore[attr-defined]
    return found


def call(name: str, prompt: int = 8, size: int = 20, *, level: int = 0, priority: int = 1, **more: Any) -> Call:
    """A call of a program whose service is at the start of a level. Prompts have nothing in common."""
    service = BOUNDS[level - 1] if level else 0
    dice = random.Random(name)
    ids = [dice.randrange(mini.VOCABULARY) for _ in range(prompt)]
    program = {"program_id": name, "program_service": service, "program_waited_ms": 0, "program_ran_ms": 0}
    return Call(name, ids, size, priority=priority * LEVELS + level, program=program, **more)


def settled(e: Engine, calls: list[Call]) -> None:
    """Asserts that every call ended correctly and left nothing behind."""
    assert not [c.name for c in calls if not c.finished]
    assert not [c.name for c in calls if not c.right], "wrong tokens"
    assert not e.left(), e.left()


# -- cases


def case_random_work(asynchronous: bool) -> None:
    """Too few slots, blocks and tokens per step; aborts; shared prefixes; calls that change level while they run."""
    forced = 0
    for seed in SEEDS:
        dice = random.Random(seed)
        e = engine(asynchronous, slots=4, blocks=dice.choice([40, 60, 200]), step_tokens=dice.choice([16, 64]))
        e.scheduler.plas.rules = PlasRules(bounds=(20, 60, 150), beta=4.0, floor_s=0.2)
        calls = []
        for i in range(40):
            prompt = [dice.randrange(2) for _ in range(dice.randint(1, 60))]
            service = dice.choice([0, 0, 10, 30, 100, 1000])
            level = e.scheduler.plas.rules.level_of(service)
            doomed = dice.randint(0, 400) if dice.random() < 0.25 else None
            at = dice.randint(0, 150)
            calls.append(
                Call(
                    f"c{i}",
                    prompt,
                    dice.randint(1, 50),
                    at=at,
                    priority=dice.choice([16, 32]) + level,
                    program={"program_id": f"p{i}", "program_service": service},
                    abort_at=None if doomed is None else at + doomed,
                )
            )
        before, after = exact_levels(e)
        e.before, e.after = before, after
        e.run(calls)
        settled(e, calls)
        forced += sum(c.preempted for c in calls)
    assert forced > 30, f"only {forced} preemptions: too few for this test"


def exact_levels(e: Engine) -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions that check at every step that no running call has more service than its level allows."""
    owed: dict[str, float] = {}

    def before() -> None:
        """Computes the service of each call. `schedule` charges first of all."""
        owed.clear()
        for request in e.scheduler.running:
            t = e.scheduler._tracked[request.request_id]
            prompt = max(min(request.num_computed_tokens, request.num_prompt_tokens), t._prompt)
            owed[request.request_id] = prompt - t.cached + 2 * max(request.num_output_tokens, t._outputs)

    def after() -> None:
        for request_id, service in owed.items():
            t = e.scheduler._tracked.get(request_id)
            if t is not None and t.call.running:
                assert service - t.call.own < e.scheduler.plas.until_demotion(t.call), "charged too late"
                assert t.request.priority % LEVELS == t.call.level

    return before, after


def case_a_slot(asynchronous: bool) -> None:
    """Long programs occupy all slots: a short one begins at once. With vLLM's own scheduler, it waits."""
    ends = {}
    for name, make in (("plas", make_scheduler), ("stock", mini.stock)):
        e = (
            engine(asynchronous, slots=2)
            if name == "plas"
            else mini.make_engine(make, asynchronous=asynchronous, slots=2)
        )
        calls = [call("long1", size=200, level=4), call("long2", size=200, level=4), call("short", size=5, at=20)]
        e.run(calls)
        settled(e, calls)
        ends[name] = calls[2].ended_at
    assert ends["plas"] < 40 < 180 < ends["stock"], ends


def case_equals_do_not_take_turns(asynchronous: bool) -> None:
    e = engine(asynchronous, slots=2)
    calls = [call(f"c{i}", size=100, level=2) for i in range(6)]
    e.run(calls)
    settled(e, calls)
    assert sum(c.preempted for c in calls) == 0


def case_a_running_call_falls(asynchronous: bool) -> None:
    """It starts as a short call. Once it has used up its level, newcomers displace it."""
    e = engine(asynchronous, slots=1)
    calls = [call("greedy", size=900), call("short", size=5, at=800), call("early", size=5, at=100)]
    e.run(calls)
    settled(e, calls)
    greedy, short, early = calls
    assert short.ended_at < greedy.ended_at  # 1000 units: 8 of the prompt, 496 tokens
    assert 496 < early.ended_at < 520, early.ended_at
    assert greedy.preempted == 2


def case_blocks(asynchronous: bool) -> None:
    """Long programs fill the KV cache; slots are free."""
    ends = {}
    for name, make in (("plas", make_scheduler), ("stock", mini.stock)):
        args: dict[str, Any] = {"asynchronous": asynchronous, "slots": 16, "blocks": 101}
        e = engine(**args) if name == "plas" else mini.make_engine(make, **args)
        calls = [call("long", prompt=20, size=370, level=4), call("short", prompt=120, size=5, at=300)]
        e.run(calls)
        settled(e, calls)
        ends[name] = calls[-1].ended_at
        assert calls[0].preempted == (name == "plas")
    assert ends["plas"] < 312 < 370 < ends["stock"], ends


def case_no_useless_preemption(asynchronous: bool) -> None:
    """All worse calls together do not have enough blocks."""
    e = engine(asynchronous, slots=16, blocks=101)
    calls = [call("worse", prompt=40, size=60, level=4), call("equal", prompt=200, size=60)]
    calls.append(call("large", prompt=300, size=5, at=5))
    e.run(calls)
    settled(e, calls)
    assert calls[0].preempted == 0


def case_tokens_of_a_step(asynchronous: bool) -> None:
    """A long prompt occupies whole steps."""
    ends = {}
    for name, make in (("plas", make_scheduler), ("stock", mini.stock)):
        args: dict[str, Any] = {"asynchronous": asynchronous, "slots": 16, "step_tokens": 16}
        e = engine(**args) if name == "plas" else mini.make_engine(make, **args)
        calls = [call("long", prompt=1600, size=3, level=4), call("short", prompt=16, size=3, at=3)]
        e.run(calls)
        settled(e, calls)
        ends[name] = calls[-1].ended_at
        assert calls[0].ended_at < 130  # nothing was computed twice
    assert ends["plas"] < 20 < 90 < ends["stock"], ends


def case_a_prompt_in_chunks(asynchronous: bool) -> None:
    """A worse call's prompt gets a chunk of each step while a better call decodes, and whole steps afterwards."""
    e = engine(asynchronous, step_tokens=64)
    e.scheduler.plas.rules = PlasRules(prompt_chunk=8)
    planned: list[dict[str, int]] = []
    e.after = lambda: planned.append(dict(e.scheduler._scheduled))
    calls = [call("better", size=20), call("worse", prompt=400, size=2, level=3, at=4)]
    e.run(calls)
    settled(e, calls)
    both = [p["worse"] for p in planned if p.keys() == {"better", "worse"}]
    alone = [p["worse"] for p in planned if p.keys() == {"worse"}]
    assert len(both) >= 10, planned
    assert max(both) == 8, planned
    assert max(alone) == 64, planned
    assert e.scheduler.max_num_scheduled_tokens == 64


def case_a_better_prompt_in_whole_steps(asynchronous: bool) -> None:
    e = engine(asynchronous, step_tokens=64)
    e.scheduler.plas.rules = PlasRules(prompt_chunk=8)
    planned: list[dict[str, int]] = []
    e.after = lambda: planned.append(dict(e.scheduler._scheduled))
    calls = [call("worse", size=20, level=3), call("better", prompt=400, size=2, at=4)]
    e.run(calls)
    settled(e, calls)
    assert max(p.get("better", 0) for p in planned) == 63, planned


def case_nothing_starves(asynchronous: bool) -> None:
    """New short programs keep arriving, and each has precedence over the long one."""
    ends = {}
    for beta in (0.0, 4.0):
        e = engine(asynchronous, slots=1)
        e.scheduler.plas.rules = PlasRules(beta=beta, floor_s=0.2)
        calls = [call(f"s{i}", size=4, at=i * 3) for i in range(400)]
        calls.append(call("long", size=100, level=5))
        e.run(calls)
        settled(e, calls)
        ends[beta] = calls[-1].ended_at
    assert ends[4.0] < ends[0.0] / 2, ends


def case_an_adapter_that_does_not_fit(asynchronous: bool) -> None:
    """A call that cannot start even after preemptions: it causes a few of them, not one per step."""
    e = engine(asynchronous, slots=2)
    e.scheduler.lora_config = SimpleNamespace(max_loras=1)
    calls = [call("long1", size=300, level=4), call("long2", size=300, level=4), call("other", size=5, at=10)]
    add = e.scheduler.add_request

    def with_adapter(request: Any) -> None:
        number = 2 if request.request_id == "other" else 1
        request.lora_request = SimpleNamespace(lora_int_id=number, lora_name=f"a{number}", lora_path="")
        add(request)

    e.scheduler.add_request = with_adapter
    e.run(calls)
    settled(e, calls)
    assert sum(c.preempted for c in calls) < 20, [c.preempted for c in calls]


def case_a_grammar_that_is_not_ready(asynchronous: bool) -> None:
    """A call whose grammar is not ready preempts nothing. Once it is ready, the call preempts at once."""
    from vllm.v1.request import RequestStatus

    e = engine(asynchronous, slots=1)
    long, other = call("long", size=200, level=4), call("grammar", size=5)
    e.add(long)
    while e.steps < 10:
        e.step()
    request = mini.make_request(other)
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    request.structured_output_request = SimpleNamespace(grammar=None)
    e._calls[other.name], e._requests[other.name] = other, request
    e.scheduler.add_request(request)
    while e.steps < 60:
        e.step()
    assert e._requests["long"].num_preemptions == 0
    request.structured_output_request.grammar = SimpleNamespace()
    for name in ("should_advance", "accept_tokens"):  # of older and newer versions
        setattr(e.scheduler.structured_output_manager, name, lambda *_, name=name: name == "accept_tokens")
    e.run([])
    settled(e, [long, other])
    assert long.preempted == 1
    assert other.ended_at < 75, other.ended_at


def case_a_paused_engine(asynchronous: bool) -> None:
    from vllm.v1.core.sched.interface import PauseState

    e = engine(asynchronous, slots=1)
    long, short = call("long", size=100, level=4), call("short", size=5)
    e.add(long)
    e.step()
    e.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    e.add(short)
    while e.scheduler.has_unfinished_requests():
        e.step()
    assert (long.finished, long.preempted, short.finished) == ("length", 0, "")
    e.scheduler.set_pause_state(PauseState.UNPAUSED)
    e.run([])
    settled(e, [long, short])


def case_the_cache_is_reset_under_running_calls(asynchronous: bool) -> None:
    e = engine(asynchronous, slots=2)
    calls = [call(f"c{i}", size=60, level=i % 3) for i in range(5)]
    for c in calls:
        e.add(c)
    for turn in range(40):
        e.step()
        if turn in (7, 20):
            e.scheduler.reset_prefix_cache(reset_running_requests=True)
    e.run([])
    settled(e, calls)


def case_an_abort_of_a_victim(asynchronous: bool) -> None:
    """In the same step in which it was preempted, and later."""
    for delay in range(4):
        e = engine(asynchronous, slots=1)
        long, short = call("long", size=100, level=4), call("short", size=30)
        e.add(long)
        for _ in range(10):
            e.step()
        e.add(short)
        for _ in range(delay):
            e.step()
        e.abort(long)
        e.run([])
        settled(e, [long, short])


def case_a_victim_whose_last_token_is_in_flight(asynchronous: bool) -> None:
    """It ends although it was preempted."""
    for at in range(3, 12):
        e = engine(asynchronous, slots=1)
        calls = [call("long", size=8, level=4), call("short", size=4, at=at)]
        e.run(calls)
        settled(e, calls)


def case_another_service_unit(asynchronous: bool) -> None:
    """Time in the batch, which is checked periodically. Here, 1000 ms are 50 steps."""
    e = engine(asynchronous, slots=1)
    e.scheduler._unit = create_unit("time")
    calls = [call("greedy", size=300), call("short", size=5, at=20)]
    e.run(calls)
    settled(e, calls)
    assert 50 <= calls[1].ended_at < 80, calls[1].ended_at


def case_requests_without_a_valid_program(asynchronous: bool) -> None:
    """Class and level are in the priority."""
    e = engine(asynchronous, slots=1)
    calls = [call("a", size=40), call("b", size=10), call("c", size=5, at=5)]
    calls[0].program, calls[0].priority = {}, 3 * LEVELS + 2
    calls[1].program, calls[1].priority = {"program_id": 7, "program_service": "x", "program_ran_ms": -1}, 0
    calls[2].program, calls[2].priority = {}, -2 * LEVELS
    e.run(calls)
    settled(e, calls)
    assert calls[1].ended_at < calls[0].ended_at
    assert calls[2].ended_at < calls[1].ended_at


def case_no_memory_leak(asynchronous: bool) -> None:
    """0.20.2 records every allocated block, and never forgets one."""
    e = engine(asynchronous, slots=4)
    e.run([call(f"c{i}", size=100) for i in range(20)])
    managers = e.scheduler.kv_cache_manager.coordinator.single_type_managers
    assert sum(len(getattr(m, "new_block_ids", ())) for m in managers) == 0
    assert not e.scheduler._scheduled or len(e.scheduler._scheduled) <= 4
    assert len(e.scheduler.plas._starving) < 200


def cases() -> Iterator[tuple[str, Callable[[bool], None]]]:
    for name, found in inspect.getmembers(sys.modules[__name__], inspect.isfunction):
        if name.startswith("case_"):
            yield name.removeprefix("case_"), found


def main() -> None:
    version = mini.prepare()
    wrong: dict[str, str] = {}
    only = sys.argv[1:]
    for name, case in cases():
        if only and name not in only:
            continue
        for asynchronous in (False, True):
            full = f"{name}[{'async' if asynchronous else 'sync'}]"
            try:
                case(asynchronous)
                wrong[full] = ""
            except Exception:
                wrong[full] = traceback.format_exc(limit=-4)
    print(json.dumps({"version": version, "cases": wrong}))


if __name__ == "__main__":
    main()
