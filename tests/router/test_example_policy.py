"""A policy from another package: selected by one setting, it runs in a real router process."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rsm.broker import Client, Settings
from rsm.broker.views.monitor import Monitor
from tests.support.paths import ROOT
from tests.support.rsm_command import clean_env
from tests.support.sim_processes import WorkerProcess, sim, state_of
from tests.support.waiting import eventually

EXAMPLE = ROOT / "examples" / "bounded_hash"
POLICY = "bounded_hash:BoundedHash"


def test_the_package_holds_what_the_setting_names() -> None:
    modules = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert modules == [POLICY.partition(":")[0]]
    assert POLICY in (EXAMPLE / "bounded_hash.py").read_text()


@pytest.mark.parametrize("calls", [1, 24])
def test_a_real_router_runs_it(settings: Settings, tmp_path: Path, calls: int) -> None:
    """A single session stays where its hash says. With many calls at once, it spills to other engines at the bound."""
    named = settings.model_copy(update={"policy": POLICY})
    path = os.pathsep.join([str(EXAMPLE), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = clean_env() | named.environment() | {"PYTHONPATH": path}
    workers = [WorkerProcess(sim(e, step_s=0.02), settings, tmp_path / f"{e}.log") for e in ("e1", "e2")]
    router = subprocess.Popen([sys.executable, "-P", "-m", "rsm.router"], env=env)
    try:
        monitor = Monitor(settings)
        eventually(lambda: all(state_of(monitor, w.engine_id) == "READY" for w in workers), 30)
        with Client(settings=settings) as client:
            handles = [client.submit("x", session="s", max_tokens=8) for _ in range(calls)]
            for handle in handles:
                handle.result(timeout=30)
            reasons = {client.record(h.id).why for h in handles}
            engines = {client.record(h.id).engine_id for h in handles}
    finally:
        router.terminate()
        assert router.wait(30) == 0
        for worker in workers:
            worker.kill()
    if calls == 1:
        assert reasons == {"hash of the session"}
    else:
        assert len(engines) == 2
        assert any(why.endswith("has its share") for why in reasons)
