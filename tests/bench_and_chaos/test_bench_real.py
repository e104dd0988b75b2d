"""The analysis of a real engine's steps."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from bench.vllm import steps, waits
from bench.vllm.engine import Call, Phase
from rsm.simulation.calibration.step_costs import COSTS, Timed, durations, error, fit
from rsm.workers.backends.vllm import steps as log
from rsm.workers.backends.vllm.steps import Step

COST = {"step_s": 5e-3, "prefill_token_s": 22e-6, "decode_seq_s": 14e-6, "context_token_s": 30e-9}
NAMES = tuple(COST)


def some_steps(count: int = 300, costs: dict[str, float] | None = None) -> list[Timed]:
    """Returns steps of many kinds, with durations from these costs."""
    dice, found = Random(1), []
    for _ in range(count):
        seqs, tokens = dice.randint(0, 256), dice.choice((0, 0, dice.randint(1, 8192)))
        context = seqs * dice.randint(10, 5000)
        step = Step(prefill_tokens=tokens, prefill_pairs=tokens * dice.randint(1, 9000), decode_seqs=seqs)
        step.context_tokens = context
        found.append(Timed(step, sum(c * COSTS[name](step) for name, c in (costs or COST).items())))
    return found


def test_the_fit_finds_the_costs() -> None:
    taken = some_steps()
    assert fit(taken, NAMES) == pytest.approx(COST, rel=1e-6)
    found = error(COST, taken)
    assert (found.median, found.p90, found.total) == pytest.approx((0, 0, 1), abs=1e-9)


def test_the_fit_separates_the_cost_of_attention() -> None:
    costs = COST | {"prefill_pair_s": 1e-9}
    assert fit(some_steps(costs=costs), tuple(costs)) == pytest.approx(costs, rel=1e-6)


def test_a_few_outliers_change_little() -> None:
    taken = some_steps()
    slow = [Timed(t.step, 50 * t.seconds) if n % 40 == 0 else t for n, t in enumerate(taken)]
    assert fit(slow, NAMES) == pytest.approx(COST, rel=0.02)


def test_no_cost_is_negative() -> None:
    taken = some_steps(costs=COST | {"context_token_s": -2e-9})
    assert fit([t for t in taken if t.seconds > 0], NAMES)["context_token_s"] == 0


def test_equal_steps_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="too similar"):
        fit([Timed(Step(decode_seqs=3, context_tokens=9), 0.005)] * 20, NAMES)


def test_a_step_begins_when_the_one_before_it_ends() -> None:
    """With asynchronous scheduling it is planned long before. When nothing runs, it begins with its planning."""
    taken = durations(
        [
            Step(planned_from=1.0, done_from=1.5, decode_seqs=1, left=1),
            Step(planned_from=1.1, done_from=1.75, decode_seqs=1),
            Step(planned_from=1.6, done_from=1.76),  # nothing was left to do
            Step(planned_from=3.0, done_from=3.25, prefill_tokens=9, left=1),
            Step(planned_from=3.5, done_from=3.75, decode_seqs=1),  # the time in between belongs to the step
        ]
    )
    assert [t.seconds for t in taken] == [0.5, 0.25, 0.25, 0.5]


def test_a_sweep_is_reported_by_kinds_of_step() -> None:
    taken, phases = [], []
    for n, (name, tokens, seqs) in enumerate([("prefill 64", 64, 0), ("decode 8 x 64", 0, 8), ("mixed", 9, 3)] * 5):
        phases.append(Phase(name, float(n), n + 1.0))
        step = Step(planned_from=n + 0.5, planned_to=n + 0.501, prefill_tokens=tokens, decode_seqs=seqs)
        step.context_tokens = n * n * seqs
        taken.append(Timed(step, sum(c * COSTS[k](step) for k, c in COST.items())))
    kinds = steps.kinds(taken, phases)
    assert [(k["phase"], k["prefill"], k["steps"]) for k in kinds] == [
        ("prefill 64", True, 5),
        ("decode 8 x 64", False, 5),
        ("mixed", True, 5),
    ]
    assert kinds[0]["ms"] == pytest.approx(5 + 64 * 0.022)
    assert kinds[0]["planning_ms"] == pytest.approx(1)
    assert len(steps.of_phases(taken, phases, "decode", "prefill")) == 10


def test_waits_are_reported_by_phase() -> None:
    phase = Phase("slots", 10.0, 20.0)
    calls = [
        Call("slots long 0", 256, 500, came=10.0, first=10.1, ended=18.0),
        Call("slots short 0", 200, 32, came=12.0, first=12.25, ended=12.5),
        Call("slots short 1", 200, 32, came=25.0, first=25.5, ended=26.0),  # of another phase
    ]
    taken = [Timed(Step(planned_from=11.0, planned_to=11.001, decode_seqs=n, preempted=1), 0.01) for n in (250, 256)]
    found = waits.summary(phase, taken, calls, slots=256)
    assert (found["short_ms"], found["short_first_ms"], found["long_ended_s"]) == ([500], [250], [8])
    assert (found["decode"]["steps"], found["full"]["steps"], found["preempted"]) == (2, 1, 2)
    assert found["full"]["planning_ms"] == pytest.approx(1)
    assert any("long calls ended after 8.0 s" in line for line in waits.lines(found))


def test_two_runs_are_compared_call_by_call(tmp_path: Path) -> None:
    for folder, last in (("a", 3), ("b", 4)):
        (tmp_path / folder).mkdir()
        tokens = {"slots long 0": [1, 2, last], "slots long 1": [5], "slots short 0": [7, 8]}
        (tmp_path / folder / "tokens.json").write_text(json.dumps(tokens))
    first, second = waits.same(tmp_path / "a", tmp_path / "b")
    assert "slots long" in first
    assert "1 of 2 are the same, the others differ from token 2 on" in first
    assert "1 of 1 are the same" in second


@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_log_has_every_token(tmp_path: Path, asynchronous: bool) -> None:
    """With vLLM's real scheduler: chunked prompts, waiting calls, a lack of blocks."""
    pytest.importorskip("vllm")
    from bench.vllm import miniature as mini

    mini.prepare()
    engine = mini.make_engine(mini.stock, asynchronous=asynchronous, slots=4, blocks=40, step_tokens=32)
    written = log.Log(engine.scheduler, tmp_path / "steps.jsonl")
    dice = Random(1)
    calls = [mini.Call(f"c{n}", dice.choices(range(1000), k=dice.randint(5, 60)), 12, at=n) for n in range(12)]
    engine.run(calls)
    written.flush()
    found = list(log.read(tmp_path / "steps.jsonl"))
    assert sum(s.preempted for s in found) == sum(c.preempted for c in calls) > 0
    computed = sum(s.prefill_tokens + s.decode_seqs for s in found)
    assert computed >= sum(len(c.prompt) + 11 for c in calls)  # preempted tokens are computed again
    assert max(s.running for s in found) <= 4 < max(s.running + s.waiting for s in found)
    assert all(s.planned_from <= s.planned_to <= s.done_from <= s.done_to for s in found)
