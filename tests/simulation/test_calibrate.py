"""Calibration: on a modelled engine, whose costs are known, and on real vLLM."""

from __future__ import annotations

import json
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import pytest

from rsm.broker.errors import InvalidRequest
from rsm.broker.settings import Settings
from rsm.simulation.calibration.measure import Sweep, calibrate, solve
from rsm.workers.backends.factory import create_backend
from rsm.workers.backends.sim.backend import SimBackend
from rsm.workers.backends.sim.config import SimConfig, SimTimes, config_of
from rsm.workers.backends.vllm import steps as vllm_steps
from rsm.workers.config import EngineConfig
from tests.support.rsm_command import run

TIMES = SimTimes(step_s=0.003, prefill_token_s=20e-6, decode_seq_s=50e-6, context_token_s=300e-9, prefill_pair_s=10e-9)
CONFIG = SimConfig(times=TIMES, max_num_seqs=16, max_num_batched_tokens=512, max_model_len=1024, speed=50.0)


class Logged(SimBackend):
    """A modelled engine whose steps are logged like those of vLLM."""

    def __init__(self, config: SimConfig, file: Path) -> None:
        super().__init__(config)
        end = self._engine.end

        def logged(step: Any) -> Any:
            ended = end(step)
            row = vllm_steps.Step(
                planned_from=step.starts_at, done_from=step.ends_at, prefill_tokens=step.prefill_tokens
            )
            row.prefill_pairs, row.decode_seqs = step.prefill_pairs, step.decode_seqs
            row.context_tokens = step.context_tokens
            with file.open("a") as log:
                log.write(json.dumps(astuple(row)) + "\n")
            return ended

        self._engine.end = logged  # type: ignore[method-assign]


async def test_the_costs_of_a_modelled_engine_are_found(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "kv_tokens")
    engine = {name: getattr(CONFIG, name) for name in names}
    backend = Logged(CONFIG, file)
    await backend.start()
    sweep = Sweep(backend, file, engine)
    await sweep.warm_up()
    known = [*await sweep.prefill(), *await sweep.decode()]
    unknown = await sweep.mixed(0.5)
    await backend.stop(0)
    found = solve(known, unknown, engine, {})
    assert found.times == pytest.approx(asdict(TIMES), rel=1e-3)
    assert len(known) > 100 < len(unknown)
    assert (found.fitted.p90, found.held_out.p90) == pytest.approx((0, 0), abs=1e-4)
    path = tmp_path / "times.json"
    path.write_text(json.dumps(found.document()))
    loaded = config_of({"times_file": str(path), "max_num_seqs": 4})
    assert (loaded.kv_tokens, loaded.max_num_seqs, loaded.max_model_len) == (CONFIG.kv_tokens, 4, 1024)
    assert asdict(loaded.times) == found.times


def test_a_worker_reads_a_calibration(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"times": {"step_s": 0.5}, "engine": {"kv_tokens": 999}}))
    args = {"times_file": str(path), "prefill_token_s": 0.1}
    backend = create_backend(EngineConfig(engine_id="e", backend="sim", engine_args=args), Settings())
    assert isinstance(backend, SimBackend)
    assert (backend.config.times.step_s, backend.config.times.prefill_token_s) == (0.5, 0.1)
    assert (backend.config.kv_tokens, backend.config.max_num_seqs) == (999, 256)
    path.write_text("[]")
    for file, why in (path, "was not written by `rsm calibrate`"), (tmp_path / "none", "No such file or directory"):
        config = EngineConfig(engine_id="e", backend="sim", engine_args={"times_file": str(file)})
        with pytest.raises(InvalidRequest, match=why):
            create_backend(config, Settings())


def test_only_vllm_can_be_calibrated() -> None:
    with pytest.raises(InvalidRequest, match="backend vllm"):
        calibrate(EngineConfig(engine_id="e", backend="sim"), Settings())


@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(400)
def test_real_vllm_is_calibrated(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    out = tmp_path / "times.json"
    more = ("--max-num-seqs", "8", "--engine-arg", "max_model_len=512", "--seconds", "3")
    done = run("calibrate", "--out", str(out), *more, timeout_s=360)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "error per step: median" in done.stdout
    found = json.loads(out.read_text())
    assert found["engine"]["max_num_seqs"] == 8
    assert found["times"]["step_s"] > 0
    assert found["held_out"]["steps"] > 50
    loaded = config_of({"times_file": str(out)})
    assert (loaded.max_num_seqs, loaded.max_model_len) == (8, 512)
