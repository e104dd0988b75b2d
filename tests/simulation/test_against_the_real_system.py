"""The simulated fleet compared with a real one: a router and workers with modelled engines, in real time with Redis."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from statistics import fmean, median

import pytest

from bench.programs.live.stack import Stack, run
from rsm.broker.settings import Settings
from rsm.simulation.fleet import FleetConfig, SimFleet
from rsm.simulation.results import ProgramTimes
from rsm.simulation.workload.programs import CallSpec, ProgramSpec, Segment
from rsm.workers.backends.sim.config import SimConfig, SimTimes
from rsm.workers.config import EngineConfig

# Long steps, so that the processes keep up on a busy machine.
TIMES = {"step_s": 0.04, "prefill_token_s": 2e-4, "decode_seq_s": 0.005, "context_token_s": 1e-6, "prefill_pair_s": 0.0}
ENGINE = {"kv_tokens": 4096, "max_num_batched_tokens": 256, "scheduler": "plas"}
BOUNDS = (100, 200, 400)


def programs() -> list[ProgramSpec]:
    """Conversations that arrive faster than two engines with two slots each can serve them."""
    random, made, at = Random(3), list[ProgramSpec](), 0.0
    for n in range(12):
        at += random.expovariate(4.0)
        context: tuple[Segment, ...] = (Segment(1, 48),)
        calls = []
        for k in range(random.randint(1, 4)):
            text = 1000 * (n + 1) + 2 * k
            prompt, output = (*context, Segment(text, random.randint(16, 200))), random.randint(4, 25)
            calls.append(CallSpec(prompt, output, text + 1, (k - 1,) if k else (), 0.1 if k else 0.0))
            context = (*prompt, Segment(text + 1, output))
        made.append(ProgramSpec(f"p{n}", "conversation", at, tuple(calls)))
    return made


WARM = [ProgramSpec(f"w{n}", "warm", 0.0, (CallSpec((Segment(9 + n, 32),), 4),)) for n in range(4)]


def order(runs: Sequence[ProgramTimes]) -> dict[str, int]:
    ended = sorted(runs, key=lambda p: p.ended_s or 0.0)
    return {p.spec.id: n for n, p in enumerate(ended)}


def test_simulated_programs_take_as_long_as_real_ones() -> None:
    """The mean response time and that of the median program are within a tenth, and programs end in about the same
    order.

    The policy is a hash: with a policy that depends on load, a few milliseconds decide on which engine a program runs.
    """
    work, policy = programs(), "session_hash"
    engines = [
        EngineConfig(engine_id=f"e{n}", backend="sim", max_num_seqs=2, engine_args=TIMES | ENGINE) for n in range(2)
    ]
    real = run(Stack(engines, {"policy": policy, "level_bounds": BOUNDS}), work, warm=WARM)
    sim = SimConfig(max_num_seqs=2, times=SimTimes(**TIMES), **ENGINE)  # type: ignore[arg-type]
    config = FleetConfig(engines=2, sim=sim, policy=policy, settings=Settings(level_bounds=BOUNDS))
    modelled = SimFleet(config).run(work).programs
    assert [p.spec.id for p in real] == [p.spec.id for p in modelled]
    took = [(r.response_s or 0.0, m.response_s or 0.0) for r, m in zip(real, modelled, strict=True)]
    assert fmean(m for _, m in took) / fmean(r for r, _ in took) == pytest.approx(1, abs=0.1), took
    assert median(abs(m - r) / r for r, m in took) < 0.1, took
    places = order(real), order(modelled)
    assert fmean(abs(places[0][name] - places[1][name]) for name in places[0]) < 1, places
