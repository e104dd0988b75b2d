"""The benchmark of programs: its workloads, and its metrics for known runs."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import fmean, median

import pytest

from bench.programs.live import stack as real
from bench.programs.live.replay import scaled
from bench.programs.metrics import Figures, ProgramRun, ideal_s, jain, quantile
from bench.programs.search import Curve, rate_of, rate_point
from bench.programs.workloads import traces
from bench.programs.workloads.lengths import Lengths
from bench.programs.workloads.synthetic import KINDS, SHAPES, synthetic
from rsm.simulation.results import CallTimes, ProgramTimes
from rsm.simulation.workload.programs import CallSpec, ProgramSpec, Segment
from rsm.workers.backends.sim.engine import SimTimes
from rsm.workers.config import EngineConfig

# The paper's table: calls per program, new prompt tokens and output tokens per call.
PAPER = {"chat": (6.66, 256, 277), "react": (10.75, 735, 34), "tree": (159.7, 467, 73)}


@pytest.mark.parametrize(("mean", "sigma", "low", "high"), [(6.66, 1.1, 1, 80), (735, 0.8, 16, 8192), (34, 0.7, 4, 99)])
def test_lengths_have_the_mean_asked_for(mean: float, sigma: float, low: int, high: int) -> None:
    lengths, rng = Lengths(mean, sigma, low, high), Random(1)
    drawn = [lengths.draw(rng) for _ in range(40_000)]
    assert fmean(drawn) == pytest.approx(mean, rel=0.02)
    assert (min(drawn), max(drawn)) == (low, high) or min(drawn) >= low


def test_an_impossible_mean_is_refused() -> None:
    with pytest.raises(ValueError, match=r"The mean 100 must be between low \(1\) and high \(80\)\."):
        Lengths(100, 1.0, 1, 80)


@pytest.mark.parametrize("kind", KINDS)
def test_the_workloads_have_the_papers_statistics(kind: str) -> None:
    programs = synthetic(kind, 1.0, 400 if kind == "tree" else 4000, 3)
    calls = [c for p in programs for c in p.calls]
    per_program, new, output = PAPER[kind]
    assert len(calls) / len(programs) == pytest.approx(per_program, rel=0.08)
    assert fmean(c.prompt[-1].tokens for c in calls) == pytest.approx(new, rel=0.03)
    assert fmean(c.output_tokens for c in calls) == pytest.approx(output, rel=0.03)
    assert max(len(p.calls) for p in programs) <= {"chat": 80, "react": 70}.get(kind, 500)
    delays = [c.delay_s for c in calls if c.delay_s]
    assert fmean(delays) == pytest.approx(SHAPES[kind].delay_s, rel=0.05)


def test_a_conversation_continues_after_its_answers() -> None:
    for p in synthetic("chat", 1.0, 50, 1):
        for n, (before, call) in enumerate(zip(p.calls, p.calls[1:], strict=False)):
            context = (*before.prompt, Segment(before.answer, before.output_tokens))
            assert call.prompt[:-1] == context
            assert call.after == (n,)
        assert p.calls[0].prompt[0] == SHAPES["chat"].system


def test_tree_search_runs_five_calls_at_a_time() -> None:
    for p in synthetic("tree", 1.0, 20, 1):
        assert len(p.calls) % 10 == 0
        for n, call in enumerate(p.calls):
            turn, place = divmod(n, 10)
            if place < 5:  # five steps from one leaf, after the judgements of the previous round
                assert call.prompt[:-1] == p.calls[turn * 10].prompt[:-1]
                assert call.after == (tuple(range(turn * 10 - 5, turn * 10)) if turn else ())
            else:  # a judgement of one of them
                assert call.after == (n - 5,)
                assert call.prompt[: len(p.calls[n - 5].prompt)] == p.calls[n - 5].prompt
    depths = {len(c.prompt) for p in synthetic("tree", 1.0, 20, 1) for c in p.calls}
    assert max(depths) <= 2 + 7 * 2 + 1


def test_only_system_prompts_are_shared() -> None:
    programs = synthetic("mixed", 1.0, 60, 1)
    own = [{s.text for c in p.calls for s in c.prompt[1:]} for p in programs]
    assert sum(map(len, own)) == len(set().union(*own))
    assert {p.calls[0].prompt[0] for p in programs} == {s.system for s in SHAPES.values()}


def test_another_rate_gives_the_same_programs() -> None:
    slow, fast = synthetic("mixed", 1.0, 100, 7), synthetic("mixed", 2.0, 50, 7)
    assert [p.calls for p in slow] == [p.calls for p in fast]
    assert [p.arrival_s for p in slow] == pytest.approx([2 * p.arrival_s for p in fast])
    assert synthetic("mixed", 1.0, 100, 8)[0] != slow[0]
    kinds = [p.kind for p in synthetic("mixed", 1.0, 3000, 1)]
    assert all(kinds.count(k) / len(kinds) == pytest.approx(1 / 3, abs=0.04) for k in KINDS)


def test_coding_sessions_are_the_scaled_sessions_of_the_trace() -> None:
    programs = traces.coding(0.1, 3000, 1)
    assert len(programs) == pytest.approx(300, rel=0.2)
    prompts = [c.prompt_tokens for p in programs for c in p.calls]
    assert max(prompts) <= traces.MAX_PROMPT
    assert median(prompts) == pytest.approx(105_000 / traces.SCALE, rel=0.25)
    assert median(c.output_tokens for p in programs for c in p.calls) == pytest.approx(216 / traces.SCALE, rel=0.2)
    shared = total = 0
    for p in programs:
        for before, call in zip(p.calls, p.calls[1:], strict=False):
            same = next((n for n, (a, b) in enumerate(zip(before.prompt, call.prompt, strict=False)) if a != b), None)
            shared += sum(s.tokens for s in call.prompt[: len(before.prompt) if same is None else same])
            total += call.prompt_tokens
    assert shared / total == pytest.approx(0.966, abs=0.02)


def test_coding_sessions_share_their_tools() -> None:
    heads = [p.calls[0].prompt[0] for p in traces.coding(0.1, 3000, 1)]
    assert len(set(heads)) < len(heads) / 2


def test_prefix_requests_keep_the_traces_order_and_blocks() -> None:
    programs = traces.prefix(10.0, 600, 1)
    assert len(programs) == pytest.approx(6000, rel=0.1)  # more than the trace has, so it repeats
    arrivals = [p.arrival_s for p in programs]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0
    lengths = [p.calls[0].prompt_tokens for p in programs[:3993]]
    assert fmean(lengths) == pytest.approx(15_325, rel=0.001)
    assert len({p.id for p in programs}) == len(programs)
    firsts = [p.calls[0].prompt[0].text for p in programs]
    assert len(set(firsts)) < len(firsts) / 2


# -- metrics

TIMES = SimTimes(step_s=0.01, prefill_token_s=0.001, decode_seq_s=0.0, context_token_s=0.0, prefill_pair_s=0.0)
HEAD, TURN = Segment(1, 100), Segment(2, 50)
# Two parallel calls after a first one; the program ends with the later of the two.
FORK = ProgramSpec(
    "p",
    "tree",
    10.0,
    (
        CallSpec((HEAD,), 10, answer=9),
        CallSpec((HEAD, Segment(9, 10), TURN), 20, after=(0,), delay_s=3.0),
        CallSpec((HEAD, Segment(9, 10), TURN), 30, after=(0,), delay_s=5.0),
    ),
)


def went(*spans: tuple[float, float, float | None], until: float = 1000) -> ProgramRun:
    """Returns FORK's result, with its calls ready, started and ended at these times."""
    times = ProgramTimes(FORK)
    for n, (ready, started, ended) in enumerate(spans):
        times.calls.append(CallTimes("p", n, "p", FORK.calls[n].prompt_tokens, FORK.calls[n].output_tokens, ready))
        times.calls[-1].started_s, times.calls[-1].reported_s, times.calls[-1].cached_tokens = started, ended, 50
    return ProgramRun.of(times, TIMES, until)


def test_the_delay_of_a_program_is_that_of_its_critical_path() -> None:
    late = went((10, 11, 12), (15, 15, 40), (17, 18, 30))
    assert (late.response_s, late.delay_s, late.longest_wait_s) == (30.0, 3.0, 1.0)
    assert late.per_token_s == pytest.approx(27 / 60)
    assert (late.prompt_tokens, late.cached_tokens) == (420, 150)
    assert went((10, 11, 12), (15, 15, 20), (17, 18, 30)).delay_s == 5.0


def test_an_idle_engine_computes_new_texts_once() -> None:
    # 100 tokens and 10 steps; then 50 more tokens (computed once for both calls) and 20 or 30 steps.
    assert ideal_s(FORK, TIMES) == pytest.approx(0.1 + 0.1 + 0.3)
    alone = went((10, 10, 10.2), (13.2, 13.2, 13.5), (15.2, 15.2, 15.5))
    assert alone.slowdown == pytest.approx(1.0)


def test_a_program_that_never_ends_starved() -> None:
    half = went((10, 11, 12), (15, 15, None))
    assert half.starved
    assert half.response_s is None
    figures = Figures.of([half, went((10, 11, 12), (15, 15, 40), (17, 18, 30))])
    assert (figures.programs, figures.unfinished, figures.starved) == (2, 1, 1)
    assert figures.per_token_mean == float("inf")
    assert figures.jain == 1.0


def test_a_program_that_waited_very_long_starved() -> None:
    """The calls run for 1 + 5 + 4 s."""
    assert went((10, 211, 212), (215, 215, 220), (217, 217, 221)).starved
    assert not went((10, 209, 210), (215, 215, 220), (217, 217, 221)).starved
    assert not went((10, 28, 28.1), (28, 28, 28.1), (28, 28, 28.1)).starved, "a shorter run does not count as 1 s"


def test_figures_of_many_programs() -> None:
    runs = [went((10, 10, 11), (14, 14, 14 + n), (16, 16, 16.5)) for n in range(3, 103)]
    figures = Figures.of(runs)
    ends = sorted((4 + n - 3) / 60 for n in range(3, 103))
    assert figures.per_token_mean == pytest.approx(fmean(ends))
    assert figures.per_token_p95 == pytest.approx(ends[94])
    assert figures.jct_p99 == pytest.approx(4 + 101)
    assert figures.hit_rate == pytest.approx(150 / 420)
    assert figures.by_kind == {"tree": pytest.approx(fmean(ends))}


def test_quantiles_and_jains_index() -> None:
    assert [quantile([1, 2, 3, 4], q) for q in (0.0, 0.25, 0.5, 0.51, 1.0)] == [1, 1, 2, 3, 4]
    assert jain([2, 2, 2]) == pytest.approx(1.0)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([]) == 1.0


# -- throughput at equal latency


def queue(capacity: float, floor: float = 0.1) -> tuple[Curve, list[int]]:
    """Returns the curve of a queue, and the list of its measured points."""
    asked: list[int] = []

    def latency(point: int) -> float:
        asked.append(point)
        rate = rate_of(point)
        return floor / (1 - rate / capacity) if rate < capacity else float("inf")

    return Curve(latency, rate_point(0.05), rate_point(64)), asked


@pytest.mark.parametrize("capacity", [0.3, 1.0, 2.7, 20.0])
@pytest.mark.parametrize("times", [1.5, 3.0, 10.0])
def test_the_rate_at_a_level_is_found(capacity: float, times: float) -> None:
    curve, asked = queue(capacity)
    exact = capacity * (1 - 1 / times)
    assert curve.sustained(0.1 * times) == pytest.approx(exact, rel=0.3 if times > 5 else 0.1)
    assert len(asked) == len(set(asked)) <= 14
    assert max(map(rate_of, asked)) <= 2.01 * max(exact, rate_of(curve.lowest))
    before = len(asked)
    curve.sustained(0.1 * times)
    assert len(asked) == before


def test_rates_outside_the_grid_are_clipped() -> None:
    curve, _ = queue(1000.0)
    assert curve.sustained(1.0) == rate_of(curve.highest)
    assert queue(0.03)[0].sustained(1.0) == 0.0


# -- in real time


def test_a_scaled_program_keeps_its_shape() -> None:
    whole = synthetic("tree", 1.0, 20, 1)[0]
    small = scaled(whole, 8, 20)
    assert [c.after for c in small.calls] == [c.after for c in whole.calls[:20]]
    for a, b in zip(whole.calls, small.calls, strict=False):
        assert [s.text for s in a.prompt] == [s.text for s in b.prompt]
        assert b.prompt_tokens == pytest.approx(a.prompt_tokens / 8, abs=len(a.prompt))


def test_programs_are_played_through_the_real_broker() -> None:
    """On modelled engines. An answer is part of the next prompt, and is found in the cache."""
    engine = {"step_s": 0.001, "prefill_token_s": 0, "decode_seq_s": 0, "context_token_s": 0}
    configs = [EngineConfig(engine_id=e, backend="sim", max_num_seqs=8, engine_args=engine) for e in ("e1", "e2")]
    programs = [replace(scaled(p, 8, 20), arrival_s=n * 0.05) for n, p in enumerate(synthetic("mixed", 1.0, 12, 1))]
    programs = [replace(p, calls=tuple(replace(c, delay_s=c.delay_s / 100) for c in p.calls)) for p in programs]
    times = real.run(real.Stack(configs, {"policy": "session_hash"}), programs)
    figures = Figures.of(ProgramRun.of(t, SimTimes(), 0) for t in times)
    assert (figures.unfinished, figures.starved) == (0, 0)
    assert figures.hit_rate > 0.4
    for program in times:
        calls = program.calls
        for spec, call in zip(program.spec.calls, calls, strict=True):
            assert call.started_s is not None
            assert call.reported_s is not None
            assert call.ready_s <= call.started_s <= call.reported_s
            assert all((calls[n].reported_s or 0) <= call.ready_s for n in spec.after)
