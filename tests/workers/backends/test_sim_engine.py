"""The pure model of an engine: slots, blocks, order, prefix cache and time, without a clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rsm.workers.backends.sim.call import Phase, SimCall, Step
from rsm.workers.backends.sim.engine import SimConfig, SimEngine, SimTimes
from rsm.workers.backends.sim.text import EOS, Answer, Prompt, answer, token_text, tokenize
from rsm.workers.meters.rate import RateMeter
from rsm.workers.scheduling.plas import PlasRules

UNIT = SimTimes(step_s=1.0, prefill_token_s=0.0, decode_seq_s=0.0, context_token_s=0.0, prefill_pair_s=0.0)


def small(**more: object) -> SimConfig:
    return SimConfig(**({"kv_tokens": 64, "block_size": BLOCK, "max_num_batched_tokens": 16, "times": UNIT} | more))  # type: ignore[arg-type]


BLOCK = 4
RUNNING = (Phase.PREFILL, Phase.DECODE)


def call(key: str, prompt: int = 4, output: int = 2, *, base: int = 0, priority: int = 0, level: int = 0) -> SimCall:
    """A call that shares no tokens with calls of another `base`."""
    ids = range(base * 1000 + 1, base * 1000 + 1 + prompt + output)
    return SimCall.of_ids(key, ids[:prompt], ids[prompt:], BLOCK, priority=priority, level=level)


def shared_blocks(c: SimCall) -> set[tuple[int, int]]:
    """The blocks of a call that other calls may share."""
    blocks = set()
    hold: tuple[Any, int] = c.held or (None, 0)
    while hold[0] is not None:
        stretch, upto = hold
        blocks |= {(id(stretch), i) for i in range(stretch.first, upto)}
        hold = stretch.parent, min(upto, stretch.first)
    return blocks


def steps(engine: SimEngine) -> Iterator[float]:
    """Runs to the end; yields the end of each step."""
    now = 0.0
    while (step := engine.begin(now)) is not None:
        engine.end(step)
        now = step.ends_at
        yield now


def planned(engine: SimEngine, most: int) -> Iterator[Step]:
    """Runs at most `most` steps; yields each as planned."""
    now = 0.0
    for _ in range(most):
        step = engine.begin(now)
        if step is None:
            return
        yield step
        engine.end(step)
        now = step.ends_at


def finish_order(engine: SimEngine, calls: list[SimCall]) -> list[str]:
    done: list[str] = []
    for _ in steps(engine):
        done += [c.key for c in calls if c.finished and c.key not in done]
    return done


def test_a_call_takes_one_step_for_its_prompt_and_one_for_each_further_token() -> None:
    engine, c = SimEngine(small()), call("a", prompt=10, output=3)
    engine.add(c, 0.0)
    assert list(steps(engine)) == [1.0, 2.0, 3.0]
    assert c.finished
    assert c.phase is Phase.DONE
    assert engine.kv_usage == 0


def test_calls_share_steps() -> None:
    engine = SimEngine(small())
    for n in range(3):
        engine.add(call(str(n), output=4, base=n), 0.0)
    assert len(list(steps(engine))) == 4  # as many as for a single call


def test_no_more_calls_run_than_there_are_slots() -> None:
    engine = SimEngine(small(max_num_seqs=2))
    calls = [call(str(n), output=2, base=n) for n in range(5)]
    for c in calls:
        engine.add(c, 0.0)
    seen = [len([c for c in calls if c.phase in RUNNING or c.produced == 2]) for _ in steps(engine)]
    assert seen == [2, 2, 4, 4, 5, 5]


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    engine = SimEngine(small(max_num_batched_tokens=8))
    short, long = call("short", prompt=4, output=4), call("long", prompt=30, output=1, base=1)
    engine.add(short, 0.0)
    engine.add(long, 1.0)
    computed = [(short.produced, long.computed) for _ in steps(engine)]
    assert computed == [(1, 4), (2, 11), (3, 18), (4, 25), (4, 30)]


@pytest.mark.parametrize(("levels", "chunks"), [((0, 3), {3}), ((2, 2), {7}), ((3, 0), {7})])
def test_a_worse_calls_prompt_is_computed_in_chunks_while_a_better_one_decodes(
    levels: tuple[int, int], chunks: set[int]
) -> None:
    rules = PlasRules(prompt_chunk=3)
    engine = SimEngine(small(kv_tokens=256, max_num_batched_tokens=8, scheduler="plas", plas=rules))
    short = call("short", prompt=4, output=6, level=levels[0])
    long = call("long", prompt=60, output=1, base=1, level=levels[1])
    engine.add(short, 0.0)
    assert [step.prefill_tokens for step in planned(engine, 1)] == [4]
    engine.add(long, 1.0)
    beside = [step.prefill_tokens for step in planned(engine, 4)]
    assert set(beside) == chunks
    alone = [step.prefill_tokens for step in planned(engine, 4) if not step.decode_seqs]
    assert max(alone) == 8


def test_the_cost_of_a_step_is_the_sum_of_its_parts() -> None:
    times = SimTimes(step_s=1.0, prefill_token_s=0.1, decode_seq_s=0.01, context_token_s=0.001, prefill_pair_s=0.0001)
    engine = SimEngine(small(times=times))
    engine.add(call("a", prompt=10, output=2), 0.0)
    first = engine.begin(0.0)
    assert first is not None
    assert first.ends_at == pytest.approx(1.0 + 10 * 0.1 + 50 * 0.0001)
    engine.end(first)
    second = engine.begin(first.ends_at)
    assert second is not None
    assert second.ends_at - second.starts_at == pytest.approx(1.0 + 0.01 + 10 * 0.001)


def test_waiting_calls_start_by_priority_then_level_then_arrival() -> None:
    engine = SimEngine(small(max_num_seqs=1))
    calls = [
        call("late", base=0), call("low", base=1, priority=1), call("deep", base=2, level=3),
        call("early", base=3), call("urgent", base=4, priority=-1, level=9),
    ]  # fmt: skip
    for c, arrival in zip(calls, (5.0, 0.0, 0.0, 1.0, 9.0), strict=True):
        engine.add(c, arrival)
    assert finish_order(engine, calls) == ["urgent", "early", "late", "deep", "low"]


def test_under_kv_pressure_the_last_in_order_is_preempted_and_still_finishes() -> None:
    engine = SimEngine(small(kv_tokens=32, prefix_caching=False))
    first, last = call("first", prompt=8, output=20), call("last", prompt=8, output=20, base=1, priority=1)
    engine.add(last, 0.0)
    engine.add(first, 1.0)
    assert finish_order(engine, [first, last]) == ["first", "last"]
    assert first.preemptions == 0
    assert last.preemptions >= 1
    assert last.produced == 20
    assert engine.cache.used == 0


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_preempted_call_leaves_the_step_and_restarts_in_the_next_at_the_earliest(prefix_caching: bool) -> None:
    engine = SimEngine(small(kv_tokens=32, prefix_caching=prefix_caching))
    low, high = call("low", prompt=14, output=8, priority=1), call("high", prompt=12, output=8, base=1)
    engine.add(low, 0.0)
    engine.end(engine.begin(0.0) or pytest.fail("nothing to do"))
    engine.add(high, 1.0)
    now = 1.0
    while not low.preemptions:
        step = engine.begin(now) or pytest.fail("nothing to do")
        assert sum(step.work.values()) + step.decode_seqs <= 16
        if not low.preemptions:
            engine.end(step)
            now = step.ends_at
    # Four blocks are free by now, but a call that was just preempted would be preempted again.
    assert (step.work, step.decode_seqs, list(engine.running)) == ({}, 1, [high])
    assert (low.computed, low.held, low.phase) == (0, None, Phase.WAITING)
    engine.end(step)
    list(steps(engine))
    assert (low.produced, high.produced) == (8, 8)
    assert low.cached == 0  # its own blocks that it finds after the restart do not count as cached


def test_a_call_waits_for_blocks_and_is_not_overtaken() -> None:
    engine = SimEngine(small(kv_tokens=32))
    big, bigger, tiny = call("big", 16, 8), call("bigger", 16, 8, base=1), call("tiny", 2, 1, base=2)
    for c, arrival in ((big, 0.0), (bigger, 1.0), (tiny, 2.0)):
        engine.add(c, arrival)
    step = engine.begin(0.0)
    assert step is not None
    assert list(step.work) == [big]
    assert engine.waiting == 2


def test_the_full_blocks_of_a_known_prompt_are_cached_except_its_last_token() -> None:
    engine = SimEngine(small())
    for key, prompt, expected in (("cold", 12, 0), ("same", 12, 8), ("longer", 17, 12), ("again", 17, 16)):
        c = call(key, prompt=prompt, output=1)
        engine.add(c, 0.0)
        list(steps(engine))
        assert c.cached == expected, key


def test_output_is_cached_for_the_next_turn() -> None:
    engine = SimEngine(small())
    engine.add(call("turn 1", prompt=8, output=9), 0.0)
    list(steps(engine))
    turn_2 = call("turn 2", prompt=20, output=1)  # its prompt begins with turn 1's prompt and output
    engine.add(turn_2, 9.0)
    list(steps(engine))
    assert turn_2.cached == 16


def test_calls_that_start_together_share_their_prefix() -> None:
    engine = SimEngine(small())
    a, b = call("a", prompt=9, output=5), call("b", prompt=9, output=5)
    engine.add(a, 0.0)
    engine.add(b, 0.0)
    engine.begin(0.0)
    assert (a.cached, b.cached) == (0, 8)
    assert engine.cache.used == 3 + 1  # b has one block of its own


def test_least_recently_used_blocks_are_evicted_first() -> None:
    engine = SimEngine(small(kv_tokens=32))

    def cached(base: int) -> int:
        c = call("x", prompt=13, output=1, base=base)
        engine.add(c, 0.0)
        list(steps(engine))
        return c.cached

    assert [cached(base) for base in (1, 2, 1)] == [0, 0, 12]
    assert cached(3) == 0  # evicts 2
    assert cached(1) == 12
    assert cached(2) < 12


def test_the_end_of_a_prompt_is_evicted_before_its_beginning() -> None:
    engine = SimEngine(small(kv_tokens=32, max_num_batched_tokens=32))
    for c, expected in ((call("a", 16, 1), 0), (call("b", 21, 1, base=1), 0), (call("a again", 16, 1), 8)):
        engine.add(c, 0.0)
        list(steps(engine))
        assert c.cached == expected, c.key


def test_without_prefix_caching_nothing_is_reused() -> None:
    engine = SimEngine(small(prefix_caching=False))
    for key in ("a", "b"):
        c = call(key, prompt=12)
        engine.add(c, 0.0)
        list(steps(engine))
        assert c.cached == 0


def test_a_removed_call_leaves_nothing_behind() -> None:
    engine = SimEngine(small(max_num_seqs=1))
    running, waiting = call("running"), call("waiting", base=1)
    engine.add(running, 0.0)
    engine.add(waiting, 1.0)
    step = engine.begin(0.0)
    assert step is not None
    engine.remove(running)
    engine.remove(waiting)
    assert engine.end(step) == []
    assert engine.begin(1.0) is None
    assert (engine.cache.used, engine.waiting, engine.running) == (0, 0, {})


def test_a_call_that_can_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 64 tokens"):
        SimEngine(small()).add(call("a", prompt=60, output=5), 0.0)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: SimTimes(step_s=-1),
        lambda: SimConfig(kv_tokens=1),
        lambda: SimConfig(speed=0),
        lambda: SimConfig(max_num_seqs=0),
        lambda: SimCall("a", 0, 1),
        lambda: SimCall("a", 1, 0),
    ],
)
def test_invalid_settings_are_refused(bad: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"modelled"):
        bad()


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=12
    ),
    slots=st.integers(1, 6),
    blocks=st.integers(16, 24),
    budget=st.integers(1, 40),
    removed=st.sets(st.integers(0, 11)),
)
def test_every_call_finishes_within_the_limits(
    shapes: list[tuple[int, int, int, int]], slots: int, blocks: int, budget: int, removed: set[int]
) -> None:
    config = small(kv_tokens=4 * blocks, max_num_seqs=slots, max_num_batched_tokens=budget)
    engine = SimEngine(config)
    calls = [call(str(n), p, o, base=base, priority=prio) for n, (p, o, prio, base) in enumerate(shapes)]
    for c in calls:
        engine.add(c, 0.0)
    for count, _ in enumerate(steps(engine)):
        assert len(engine.running) <= slots
        assert engine.cache.used <= blocks
        assert engine.cache.live == len({b for c in engine.running for b in shared_blocks(c)})
        assert min(engine.cache.private, engine.cache.idle) >= 0
        if count in removed and count < len(calls):
            engine.remove(calls[count])
        assert count < 5000
    assert all(c.phase is Phase.DONE for c in calls)
    assert all(c.finished for n, c in enumerate(calls) if n not in removed)
    assert engine.cache.used == 0


RULES = PlasRules(bounds=(20, 60, 200), most_victims=2)


def random_calls(random: Random, n: int) -> list[tuple[float, SimCall]]:
    """Calls and their arrivals. Their prompts share prefixes."""
    at, calls = 0.0, []
    for i in range(n):
        at += random.expovariate(0.5)
        prompt = [(random.randint(1, 3) * 10 + d, random.choice((3, 8, 17, 33))) for d in range(random.randint(1, 4))]
        output = (1000 + i, random.randint(1, 40))
        inherited = random.choice((0, 0, 30, 100, 1000))
        program = {"program": random.choice("abcd"), "inherited": inherited, "level": RULES.level_of(inherited)}
        times = {"waited_s": random.choice((0.0, 5.0)), "ran_s": random.choice((0.0, 2.0))}
        priority = random.choice((0, 0, 1))
        calls.append((at, SimCall.of_texts(str(i), prompt, output, BLOCK, priority=priority, **program, **times)))
    return calls


def run_in_time(engine: SimEngine, calls: list[tuple[float, SimCall]], most: int) -> dict[str, float]:
    """Runs calls that arrive at given times, up to `most` steps at once; returns when each ended."""
    ends: dict[str, float] = {}
    coming, step, now = iter(calls), None, 0.0
    following = next(coming, None)
    while (step := step or engine.begin(now, most)) or following:
        if following and (step is None or following[0] <= step.ends_at):
            now, call = following
            engine.add(call, now)
            if step:
                engine.cut(step, now)
            following = next(coming, None)
        elif step:
            now = step.ends_at
            ends |= {call.key: now for call in engine.end(step)}
            step = None
    return ends


@pytest.mark.parametrize("seed", range(200))
def test_many_steps_at_once_give_the_results_of_single_steps(seed: int) -> None:
    random = Random(seed)
    config = small(
        kv_tokens=random.choice((200, 400, 1000)),
        max_num_batched_tokens=random.choice((8, 32, 100)),
        max_num_seqs=random.choice((1, 3, 8)),
        prefix_caching=random.random() < 0.8,
        scheduler=random.choice(("fcfs", "priority", "plas", "plas")),
        plas=replace(RULES, beta=random.choice((0.0, 0.93, 7.1))),
        times=SimTimes(step_s=0.10713, prefill_token_s=0.00317, decode_seq_s=0.01093, context_token_s=1.37e-4),
    )
    found = []
    for most in (1, 10**9):
        engine, calls = SimEngine(config), random_calls(Random(seed), 40)
        ends = run_in_time(engine, calls, most)
        assert engine.cache.used == engine.waiting == 0
        found.append([(ends[c.key], c.started_s, c.first_s, c.cached, c.preemptions) for _, c in calls])
    for single, many in zip(*found, strict=True):
        assert single == pytest.approx(many, abs=1e-9)


@pytest.mark.parametrize(
    "text", [" w0 w1 w31999 w7", " w32000 w99999", " w2 w3", " w07 w5", " w123456 w1", " w1w2", " w5 "]
)
def test_printed_ids_are_tokenized_as_in_any_text(text: str) -> None:
    """Texts that consist of printed ids have a fast path; the same texts after anything else do not."""
    assert tokenize("x" + text) == tokenize("x") + tokenize(text)
    assert Prompt(text).size() == len(tokenize(text))
    assert Prompt(text).origin() == (Prompt(text).seed(), 0)


def test_a_longer_text_keeps_its_tokens_and_an_answer_in_a_prompt_gives_its_ids() -> None:
    text = "Explain quantum  computing\n\nto me, please."
    ids = tokenize(text)
    assert tokenize(text + " And then?")[: len(ids)] == ids
    assert len(text) / 6 < len(ids) < len(text) / 2
    found = answer(7, 20)
    assert tokenize(text + found.text) == ids + found.ids
    assert found.text == "".join(map(token_text, found.ids))


def test_an_answer_depends_on_the_prompt_and_is_the_same_at_any_length() -> None:
    one, other = Prompt(text="one").seed(), Prompt(text="other").seed()
    assert answer(one, 50).ids != answer(other, 50).ids
    assert answer(one, 50).ids == answer(one, 90_000).ids[:50]
    long = answer(one, 90_000)
    assert (len(long.ids), long.text) == (90_000, "".join(map(token_text, long.ids)))
    assert long.chars(80_000) == len("".join(map(token_text, long.ids[:80_000])))


def test_a_prompt_that_ends_with_its_own_answer_is_continued() -> None:
    whole = answer(Prompt(text="Say it").seed(), 12)
    for done in range(12):
        seed, skip = Prompt(text="Say it" + whole.text[: whole.chars(done)]).origin()
        rest = answer(seed, 12 - done, skip=skip)
        assert (skip, rest.ids) == (done, whole.ids[done:])
    assert Prompt(text="Say it w1 w2").origin() == (Prompt(text="Say it w1 w2").seed(), 0), "not its own words"
    assert Prompt(text=" w1 w2").origin() == (Prompt(text=" w1 w2").seed(), 0)
    assert Prompt(text="Say it" + whole.text + " more").origin()[1] == 0


def test_a_continued_answer_ends_where_the_whole_one_does() -> None:
    whole = answer(11, 500, eos_mean=20)
    assert whole.finish_reason == "stop"
    rest = answer(11, 500, eos_mean=20, skip=1)
    assert (rest.ids, rest.finish_reason) == (whole.ids[1:], "stop")


def test_an_answer_ends_before_the_first_complete_stop_string() -> None:
    whole = answer(3, 30)
    second, third = token_text(whole.ids[1]), token_text(whole.ids[2])
    for stops in ((second,), (third, second)):
        stopped = answer(3, 30, stops)
        assert (stopped.finish_reason, stopped.ids) == ("stop", whole.ids[:2])
        assert stopped.text == token_text(whole.ids[0])
    assert answer(3, 30, ("never said",)).ids == whole.ids


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    whole = answer(3, 30)
    cut = answer(3, 30, (whole.text[8:14],))
    for tokens in range(len(cut.ids) + 1):
        assert cut.text.startswith(cut.text[: cut.released(tokens)])
        assert cut.released(tokens) <= max(0, whole.chars(tokens) - 5) or tokens == len(cut.ids)
    assert cut.released(len(cut.ids)) == len(cut.text) == 8


def test_answers_with_eos_have_about_the_mean_length() -> None:
    ends: list[Answer] = [answer(seed, 10_000, eos_mean=40) for seed in range(2000)]
    assert all(e.finish_reason == "stop" and e.ids[-1] == EOS for e in ends)
    assert 36 < sum(len(e.ids) - 1 for e in ends) / len(ends) < 45
    assert answer(5, len(ends[5].ids) - 1, eos_mean=40).finish_reason == "length"


def test_the_rate_follows_events_and_decays() -> None:
    meter = RateMeter(tau_s=10)
    assert meter.per_s(0.0) == 0
    for second in range(5):
        meter.add(100, float(second))
    assert meter.per_s(4.0) == pytest.approx(100, rel=0.2)  # right from the start, long before 10 s
    for second in range(5, 60):
        meter.add(50, float(second))
    assert meter.per_s(59.0) == pytest.approx(50, rel=0.1)
    assert meter.per_s(159.0) < 1
