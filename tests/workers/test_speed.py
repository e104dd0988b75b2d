"""An engine's measured speed, compared with its true speed."""

from __future__ import annotations

import asyncio
from math import inf
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from rsm.broker.protocol.snapshot import Speed
from rsm.workers.backends.base import Job
from rsm.workers.backends.sim.backend import SimBackend
from rsm.workers.backends.sim.engine import SimConfig, SimTimes
from rsm.workers.backends.vllm.backend import Meter
from rsm.workers.meters.calls import CallMeter
from rsm.workers.meters.kv_cache import CacheMeter
from rsm.workers.meters.speed import PRIOR, Mean, SpeedMeter, StepWindow

FAST = Speed(0.006, 36e-6, 60e-6)
SLOW = Speed(0.2, 5e-3, 0.02)


def feed(meter: SpeedMeter, true: Speed, steps: int, seed: int = 1, noise: float = 0.1) -> None:
    """Steps of an engine with batches of all sizes, some with prompts."""
    rng = Random(seed)
    for _ in range(steps):
        batch, prompt = rng.randint(1, 64), rng.choice((0, 0, 0, 0, 500, 2000))
        exact = true.step_s + prompt * true.token_s + batch * true.seq_s
        meter.add(exact * rng.lognormvariate(0, noise), 1, prompt, batch)


def close(found: Speed, true: Speed, within: float) -> bool:
    return all(
        abs(a - b) <= within * b
        for a, b in (
            (found.prefill_tps, true.prefill_tps),
            *((found.decode_tps(n), true.decode_tps(n)) for n in (1, 8, 64)),
        )
    )


@pytest.mark.parametrize("true", [FAST, SLOW], ids=["fast", "slow"])
@pytest.mark.parametrize("seed", range(3))
def test_it_converges(true: Speed, seed: int) -> None:
    meter = SpeedMeter()
    assert (meter.speed, meter.measured) == (PRIOR, False)
    feed(meter, true, 30, seed)
    assert meter.measured
    assert close(meter.speed, true, 0.5)
    feed(meter, true, 2000, seed + 10)
    assert close(meter.speed, true, 0.1)


def test_rare_outliers_do_not_mislead_it() -> None:
    meter = SpeedMeter()
    for n in range(20):
        feed(meter, FAST, 100, n)
        meter.add(8.0, 1, 2000, 8)  # a compilation, or a stopped process
    assert close(meter.speed, FAST, 0.35)


def test_it_follows_an_engine_that_changes() -> None:
    meter = SpeedMeter(half_life_s=10)
    feed(meter, FAST, 5000)
    slower = Speed(FAST.step_s * 3, FAST.token_s * 3, FAST.seq_s * 3)
    feed(meter, slower, 3000)
    assert close(meter.speed, slower, 0.2)
    feed(meter, FAST, 9000)
    assert close(meter.speed, FAST, 0.2)


def test_costs_that_are_not_separable_still_add_up() -> None:
    meter = SpeedMeter()
    for n in range(1000):
        prompt = 1000 * (n % 4 == 0)
        meter.add(FAST.step_s + 8 * FAST.seq_s + prompt * FAST.token_s, 1, prompt, 8)
    assert meter.speed.decode_tps(8) == pytest.approx(FAST.decode_tps(8), rel=0.02)
    assert meter.speed.prefill_tps == pytest.approx(FAST.prefill_tps, rel=0.02)


def test_an_unobserved_cost_stays_the_same() -> None:
    meter = SpeedMeter()
    for _ in range(1000):
        meter.add(0.1, 1, 0, 4)
    assert not meter.measured, "no prompt yet"
    assert meter.speed.token_s == PRIOR.token_s
    meter = SpeedMeter()
    feed(meter, FAST, 500)
    learned = meter.speed.token_s
    for _ in range(20_000):
        meter.add(FAST.step_s + 4 * FAST.seq_s, 1, 0, 4)
    assert meter.speed.token_s == pytest.approx(learned, rel=0.2), "work without prompts does not change it"


def test_empty_stretches_are_ignored() -> None:
    meter = SpeedMeter()
    for nothing in ((0.0, 1, 5, 1), (-1.0, 1, 5, 1), (1.0, 0, 0, 0)):
        meter.add(*nothing)
    assert (meter.speed, meter.measured) == (PRIOR, False)


def test_long_stretches_work_like_short_ones() -> None:
    meter, rng = SpeedMeter(), Random(2)
    for _ in range(400):
        steps, batch, prompts = rng.randint(10, 60), rng.randint(1, 64), rng.randint(0, 9) * 700
        seconds = steps * (FAST.step_s + batch * FAST.seq_s) + prompts * FAST.token_s
        meter.add(seconds, steps, prompts, steps * batch)
    assert close(meter.speed, FAST, 0.05)


def test_a_window_combines_a_prompts_time_and_its_tokens() -> None:
    """The engine reports the tokens of a chunked prompt only with its last chunk."""
    meter = SpeedMeter()
    window = StepWindow(meter)
    rng = Random(3)
    for _ in range(20_000):
        batch, chunks = rng.randint(1, 32), 4 * (rng.random() < 1 / 30)
        for n in range(chunks):
            seconds = FAST.step_s + 2048 * FAST.token_s + batch * FAST.seq_s
            window.add(seconds, 2048 * chunks if n == chunks - 1 else 0, batch)
        window.add(FAST.step_s + batch * FAST.seq_s, 0, batch)
    assert close(meter.speed, FAST, 0.15)


def test_a_recent_mean() -> None:
    mean = Mean(10)
    assert mean.value == 0
    mean.add(5)
    assert mean.value == 5, "there is only one value"
    for _ in range(100):
        mean.add(50)
    assert mean.value == pytest.approx(50, rel=0.01)


# -- from calls alone


def test_speeds_from_calls_one_after_another() -> None:
    meter, rng, now = CallMeter(), Random(4), 0.0
    for _ in range(200):
        prompt, output = rng.choice((50, 900, 4000)), rng.randint(5, 100)
        begun = meter.begin(now)
        now += FAST.step_s + FAST.seq_s + prompt * FAST.token_s
        begun.first(now, prompt * 1.3)  # the guess is a bit off
        begun.first(now + 1, 9999)  # only the first chunk is first
        now += (output - 1) * (FAST.step_s + FAST.seq_s)
        begun.end(now, prompt, output)
        begun.end(now, prompt, output)
        now += rng.random() * 3  # idle time does not count
    assert meter.meter.measured
    assert meter.meter.speed.decode_tps(1) == pytest.approx(FAST.decode_tps(1), rel=0.1)
    assert meter.meter.speed.prefill_tps == pytest.approx(FAST.prefill_tps, rel=0.15)
    assert meter.completion_tokens == pytest.approx(52, rel=0.3)


def test_calls_that_do_not_stream_or_end_early() -> None:
    meter, rng, now = CallMeter(), Random(5), 0.0
    for _ in range(300):
        prompt, output = rng.choice((50, 900, 4000)), rng.randint(5, 100)
        begun = meter.begin(now)
        now += prompt * FAST.token_s + output * (FAST.step_s + FAST.seq_s)
        begun.end(now, prompt, output)
        meter.begin(now).end(now, 0, 0, whole=False)
    assert meter.meter.speed.decode_tps(1) == pytest.approx(FAST.decode_tps(1), rel=0.1)
    assert meter.meter.speed.prefill_tps == pytest.approx(FAST.prefill_tps, rel=0.1)
    assert meter.completion_tokens > 40, "stopped calls do not count for lengths"


@pytest.mark.parametrize("batch", [8, 64])
def test_the_cost_of_concurrent_calls_adds_up(batch: int) -> None:
    """The share of the prompts is less exact; routers use the sum."""
    meter, rng, now = CallMeter(), Random(6), 0.0
    calls: list[Any] = []
    work = 0.0
    for n in range(6000):
        while len(calls) < batch:
            prompt, output = rng.choice((100, 1000, 3000)), rng.randint(10, 200)
            calls.append([prompt, output, 0, meter.begin(now)])
            work += prompt * FAST.token_s + output * (FAST.step_s / batch + FAST.seq_s)
        fresh = [c for c in calls if not c[2]][:4]
        now += FAST.step_s + sum(c[0] for c in fresh) * FAST.token_s + (batch - len(fresh)) * FAST.seq_s
        for c in [c for c in calls if c[2] or c in fresh]:
            c[2] += 1
            if c[2] == 1 and n % 2:
                c[3].first(now, c[0])
            if c[2] == c[1]:
                c[3].end(now, c[0], c[1])
                calls.remove(c)
    speed = meter.meter.speed
    each = 1367 * speed.token_s + 105 * (speed.step_s / batch + speed.seq_s)
    true = 1367 * FAST.token_s + 105 * (FAST.step_s / batch + FAST.seq_s)
    assert each == pytest.approx(true, rel=0.25)


# -- caches


def test_the_age_of_a_cache() -> None:
    cache = CacheMeter(capacity=1000)
    assert cache.age_s(5.0) == inf
    for second in range(100):
        cache.add(50, float(second))
        if second < 20:
            assert cache.age_s(float(second)) == inf, "it is not full"
        else:
            assert cache.age_s(float(second)) == pytest.approx(20, abs=1.5), "1000 tokens ago"
    assert cache.age_s(200.0) == pytest.approx(120, abs=1.5), "nothing was computed in between"
    cache.add(5000, 200.0)
    assert cache.age_s(201.0) <= 102, "all of it was replaced at once"
    unknown = CacheMeter()
    unknown.add(10**9, 1.0)
    assert (unknown.age_s(2.0), unknown.computed) == (inf, 10**9)


def test_the_share_of_expected_tokens_that_is_found() -> None:
    cache = CacheMeter()
    assert cache.reuse_found == 1
    cache.found(0, 9000)
    assert cache.reuse_found == 1, "nothing was expected"
    for _ in range(50):
        cache.found(1000, 0)
    assert cache.reuse_found < 0.1
    for _ in range(200):
        cache.found(1000, 4000)  # more than expected counts as all
    assert cache.reuse_found == pytest.approx(1, abs=0.1)


# -- engines


async def run(backend: SimBackend, key: str, prompt_tokens: int) -> None:
    body = {"prompt_token_ids": list(range(prompt_tokens)), "max_tokens": 60}
    await backend.run(Job(key, key, key, "generate", body), lambda _: None)


async def test_a_modelled_engine_measures_its_own_times() -> None:
    times = SimTimes(step_s=0.01, prefill_token_s=50e-6, decode_seq_s=200e-6, context_token_s=0)
    backend = SimBackend(SimConfig(max_num_seqs=16, times=times, speed=50, prefix_caching=False))
    await backend.start()
    assert backend.load().speed is None
    rng = Random(7)
    for _ in range(12):
        await asyncio.gather(*(run(backend, str(i), rng.randint(10, 3000)) for i in range(rng.randint(1, 16))))
    found = backend.load().speed
    await backend.stop(0)
    assert found is not None
    assert found.prefill_tps == pytest.approx(50 / 50e-6, rel=0.1), "in real seconds, 50 modelled ones each"
    for batch in (1, 16):
        assert found.decode_tps(batch) == pytest.approx(50 * batch / (0.01 + batch * 200e-6), rel=0.1)


def test_vllms_steps_are_measured_from_one_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("rsm.workers.backends.vllm.backend.time.perf_counter", lambda: now)
    meter, rng = Meter(), Random(8)
    for _ in range(400):
        now += 30.0  # idle
        meter.begin()
        batch, computed = rng.randint(1, 16), rng.randint(50, 4000)
        for n in range(40):
            prompt = computed if n == 0 else 0
            now += FAST.step_s + prompt * FAST.token_s + batch * FAST.seq_s
            tokens = SimpleNamespace(computed=prompt)
            iteration = SimpleNamespace(num_generation_tokens=batch, prompt_token_stats=tokens)
            left = SimpleNamespace(kv_cache_usage=0.5, num_running_reqs=0 if n == 39 else batch, num_waiting_reqs=0)
            meter.record(left, iteration)
        meter.idle()
    assert close(meter.speed.speed, FAST, 0.1)
    meter.record(None, None)  # no statistics
    old = SimpleNamespace(num_generation_tokens=1, num_prompt_tokens=5)  # an old vLLM, which counts cached ones too
    meter.record(None, old)


def test_a_speed_as_text() -> None:
    assert Speed.of(str(FAST)) == FAST
    for junk in ("", "1 2", "a b c", "1 2 nan", "-1 2 3", "inf 1 1"):
        assert Speed.of(junk) is None
    free = Speed(0, 0, 0)
    assert (free.prefill_tps, free.decode_tps(4), FAST.decode_tps(0)) == (0, 0, 0)
