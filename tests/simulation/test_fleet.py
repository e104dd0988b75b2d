"""Fleets in virtual time."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from math import inf
from pathlib import Path
from random import Random

import pytest

from rsm.broker.errors import InvalidRequest
from rsm.broker.settings import Settings
from rsm.simulation.fleet import FleetConfig, Hops, SimFleet
from rsm.simulation.results import Results
from rsm.simulation.workload.conversations import conversations
from rsm.simulation.workload.files import read_workload, write_workload
from rsm.simulation.workload.programs import CallSpec, ProgramSpec, Segment
from rsm.workers.backends.sim.config import SimConfig, SimTimes
from tests.support.rsm_command import run

UNIT = SimTimes(step_s=1.0, prefill_token_s=0.0, decode_seq_s=0.0, context_token_s=0.0, prefill_pair_s=0.0)
NO_HOPS = Hops(submit_s=0.0, claim_s=0.0, finish_s=0.0)


def chain(name: str, *outputs: int, arrival_s: float = 0.0, delay_s: float = 0.0, prompt: int = 1) -> ProgramSpec:
    """Calls one after the other. Each has a prompt of its own."""
    first = hash(name) % 10**9 * 100
    calls = tuple(
        CallSpec((Segment(first + n, prompt),), out, after=(n - 1,) if n else (), delay_s=delay_s if n else 0.0)
        for n, out in enumerate(outputs)
    )
    return ProgramSpec(name, "chain", arrival_s, calls)


def random_programs(seed: int, n: int = 30) -> list[ProgramSpec]:
    """Programs of chains and forks whose prompts grow."""
    random, programs, at = Random(seed), [], 0.0
    for i in range(n):
        at += random.expovariate(1.0)
        context: tuple[Segment, ...] = (Segment(1, 100),)
        calls: list[CallSpec] = []
        for k in range(random.randint(1, 8)):
            answer, output = (i + 1) * 1000 + 2 * k, random.randint(1, 60)
            prompt = (*context, Segment(answer + 1, random.randint(5, 300)))
            after = tuple(random.sample(range(k), min(k, random.randint(1, 2))))
            calls.append(CallSpec(prompt, output, answer, after, random.choice((0.0, 0.5)), random.choice(("", "sub"))))
            context = (*prompt, Segment(answer, output))
        programs.append(ProgramSpec(f"p{i}", "random", at, tuple(calls)))
    return programs


def figures(results: Results) -> list[object]:
    return [(p.spec.id, p.ended_s, p.delay_s, p.calls) for p in results.programs]


@pytest.mark.parametrize("policy", ["autellix", "least_loaded", "round_robin", "session_hash"])
def test_every_call_ends_once_and_tokens_add_up(policy: str) -> None:
    programs = random_programs(1)
    config = FleetConfig(engines=3, sim=SimConfig(max_num_seqs=4, kv_tokens=4096), policy=policy)
    results = SimFleet(config).run(programs)
    assert not results.unfinished
    for spec, p in zip(programs, results.programs, strict=True):
        assert sorted(c.index for c in p.calls) == list(range(len(spec.calls)))
        for c in p.calls:
            ready = max((_reported(p, b) for b in spec.calls[c.index].after), default=spec.arrival_s)
            assert c.ready_s == ready + spec.calls[c.index].delay_s
            times = (c.ready_s, c.assigned_s, c.claimed_s, c.started_s, c.first_token_s, c.ended_s, c.reported_s)
            assert list(times) == sorted(times)  # type: ignore[type-var]
            assert 0 <= c.cached_tokens < c.prompt_tokens
        assert p.ended_s == max(c.reported_s or inf for c in p.calls)
    for mine, theirs in (("calls", len), ("output_tokens", None), ("prompt_tokens", None), ("cached_tokens", None)):
        total = sum(getattr(e, mine) for e in results.engines)
        assert total == (len(results.calls) if theirs else sum(getattr(c, mine) for c in results.calls))
    assert sum(c.output_tokens for c in results.calls) == sum(p.output_tokens for p in programs)


def _reported(p: object, index: int) -> float:
    return next(c.reported_s for c in p.calls if c.index == index)  # type: ignore[attr-defined, no-any-return]


def test_equal_seeds_give_equal_runs() -> None:
    config = FleetConfig(engines=2, sim=SimConfig(max_num_seqs=4), hops=Hops(jitter=0.5))
    runs = [figures(SimFleet(config, seed).run(random_programs(2))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_programs_that_are_not_done_at_the_horizon_are_reported() -> None:
    programs = [chain("short", 3), chain("long", 3, 50), chain("late", 1, arrival_s=100.0)]
    config = FleetConfig(sim=SimConfig(times=UNIT), hops=NO_HOPS, horizon_s=20.0)
    results = SimFleet(config).run(programs)
    assert [p.spec.id for p in results.programs] == ["short", "long"]
    assert [p.spec.id for p in results.unfinished] == ["long"]
    assert [c.ended_s for c in results.programs[1].calls] == [3.0, None]
    assert results.programs[1].calls[1].first_token_s == 4.0
    assert results.until_s == 20.0


def test_a_call_that_can_never_fit_fails_its_program_and_no_other() -> None:
    config = FleetConfig(sim=SimConfig(times=UNIT, kv_tokens=160), hops=NO_HOPS)
    results = SimFleet(config).run([chain("big", 200), chain("small", 2)])
    assert [p.spec.id for p in results.unfinished] == ["big"]
    assert "more than 160 tokens" in results.programs[0].error
    assert results.programs[1].response_s == 2.0


def test_delays_on_the_path_are_known() -> None:
    results = SimFleet(FleetConfig(sim=SimConfig(times=UNIT), hops=NO_HOPS)).run([chain("a", 2, 2, 2, delay_s=5.0)])
    assert (results.programs[0].delay_s, results.programs[0].response_s) == (10.0, 16.0)


def waits(config: FleetConfig) -> float:
    """The total waiting time of the paper's example (arXiv 2502.13965, figure 2), in decode steps."""
    programs = [chain("A", 4, 3, 1, 1), chain("B", 3, 3, 4), chain("C", 1, 2), chain("D", 4)]
    results = SimFleet(config).run(programs)
    return sum(p.response_s or inf for p in results.programs) - sum(p.output_tokens for p in programs)


def test_the_papers_example_waits_as_long_as_in_the_paper() -> None:
    """FCFS 18, PLAS 12. The paper gives no levels, so they are chosen here: a step is 2 units, a call's prompt 1."""
    sim = SimConfig(times=UNIT, max_num_seqs=2)
    fcfs = FleetConfig(sim=replace(sim, scheduler="fcfs"), hops=NO_HOPS, by_program=False, prefetch=0)
    assert waits(fcfs) == 18
    found = {}
    for bounds in ((3,), (3, 6), (4, 8, 16), (2, 4, 8, 16), (6, 12, 24), (9, 18)):
        plas = FleetConfig(
            sim=replace(sim, scheduler="plas"), hops=NO_HOPS, settings=Settings(level_bounds=bounds), prefetch=2
        )
        found[bounds] = waits(plas)
    assert max(found.values()) < 18
    assert found[2, 4, 8, 16] == 12


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no routing policy 'nonsense'"):
        SimFleet(FleetConfig(policy="nonsense")).run([])


# -- files and the command


def test_a_written_workload_is_read_back(tmp_path: Path) -> None:
    programs = random_programs(5)
    write_workload(tmp_path / "w.jsonl", programs)
    assert read_workload(tmp_path / "w.jsonl") == programs


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("[]", "TypeError"),
        ("{", "JSONDecodeError"),
        ('{"id": "p", "arrival_s": 0, "calls": []}', "at least one call"),
        ('{"id": "p", "arrival_s": -1, "calls": [{"prompt": [[1, 2]], "output_tokens": 1}]}', "-1 is not a time"),
        ('{"id": "p", "arrival_s": 0, "calls": [{"prompt": [[1, 0]], "output_tokens": 1}]}', "call 0 needs"),
        (
            '{"id": "p", "arrival_s": 0, "calls": [{"prompt": [[1, 2]], "output_tokens": 1, "after": [0]}]}',
            "earlier calls",
        ),
    ],
)
def test_the_error_names_an_invalid_line(tmp_path: Path, line: str, wrong: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(f'{{"id": "p", "arrival_s": 0, "calls": [{{"prompt": [[1, 2]], "output_tokens": 1}}]}}\n{line}\n')
    with pytest.raises(InvalidRequest, match=f"Line 2 of .*{wrong}"):
        read_workload(path)


def test_conversations_arrive_at_their_rate_and_grow() -> None:
    programs = conversations(2.0, 500.0, seed=1)
    assert 900 < len(programs) < 1100
    assert programs == conversations(2.0, 500.0, seed=1) != conversations(2.0, 500.0, seed=2)
    for p in programs:
        prompts = [c.prompt for c in p.calls]
        assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(prompts))


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    write_workload(tmp_path / "w.jsonl", [chain("a", 3, 4), chain("b", 5)])
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"times": {"step_s": 2.0, "prefill_token_s": 0.0}, "engine": {"kv_tokens": 4096}}))
    args = ("simulate", "--workload", str(tmp_path / "w.jsonl"), "--times-file", str(times))
    shown = run(*args, "--engines", "2", "--policy", "round_robin", "--engine-scheduler", "fcfs")
    assert (shown.returncode, "2 x sim-8b, round_robin, fcfs" in shown.stdout) == (0, True)
    found = json.loads(run(*args, "--json", "--engine-arg", "step_s=1.0", "--seconds", "9").stdout)
    assert (found["programs"], found["unfinished"], found["calls"]) == (2, 0, 3)
    assert found["response_mean_s"] == pytest.approx(6.5, abs=0.02)  # the second call of "a" waits for a step
    assert run(*args, "--engine-arg", "nonsense=1").returncode == 1
    assert "was not written by `rsm calibrate`" in run(*args[:3], "--times-file", str(tmp_path / "w.jsonl")).stderr
