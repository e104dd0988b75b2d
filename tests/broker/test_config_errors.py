"""Errors of a configuration name the variable and the allowed values, and quote no value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rsm.broker import Settings
from rsm.broker.config_errors import explain
from rsm.workers.config import EngineConfig
from tests.support.rsm_command import RSM, clean_env, run

SAID = {
    "RSM_LEASE_MS": "RSM_LEASE_MS must be a whole number, at least 300 (default: 2500).",
    "RSM_BATCH": "RSM_BATCH must be a whole number, at least 1 and at most 4096 (default: 256).",
    "RSM_STARVATION_BETA": "RSM_STARVATION_BETA must be a number, at least 0 (default: 8.0).",
    "RSM_ADMISSION_FACTOR": "RSM_ADMISSION_FACTOR must be a number, more than 0 (default: 1.0).",
    "RSM_STEALING": "RSM_STEALING must be True or False (default: True).",
    "RSM_SERVICE_RULE": "RSM_SERVICE_RULE must be path or total (default: path).",
    "RSM_ENGINE_SCHEDULER": "RSM_ENGINE_SCHEDULER must be fcfs, priority or plas (default: priority).",
    "RSM_LOG_FORMAT": "RSM_LOG_FORMAT must be text or json (default: text).",
    "RSM_LOG_LEVEL": "RSM_LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR.",
    "RSM_LEVEL_BOUNDS": ("RSM_LEVEL_BOUNDS must be whole numbers (default: 1000 4000 16000 64000 256000 1000000)."),
}
SECRET = "geheim"


def error_of(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    return explain(caught.value)


@pytest.mark.parametrize(("variable", "sentence"), SAID.items())
def test_a_wrong_setting(monkeypatch: pytest.MonkeyPatch, variable: str, sentence: str) -> None:
    assert error_of(monkeypatch, **{variable: SECRET}) == sentence


def test_every_setting_that_can_be_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """All settings except texts and paths reject a word."""
    free = {"redis_url", "data_dir", "namespace", "policy", "service_unit", "openai_api_key"}
    for name in Settings.model_fields.keys() - free:
        with monkeypatch.context() as patched:
            said = error_of(patched, **{f"RSM_{name.upper()}": SECRET})
        assert said.startswith(f"RSM_{name.upper()} must be ")
        assert SECRET not in said


def test_values_that_are_out_of_bounds_or_do_not_fit_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        said = error_of(patched, RSM_LEASE_MS="10", RSM_BATCH="5000")
        assert said == f"{SAID['RSM_LEASE_MS']} {SAID['RSM_BATCH']}"
    with monkeypatch.context() as patched:
        said = error_of(patched, RSM_MAX_OPEN_BYTES="5")
        assert said == "RSM_MAX_OPEN_BYTES must be 0 or at least RSM_MAX_BODY_BYTES (8388608)."
    with monkeypatch.context() as patched:
        assert error_of(patched, RSM_LEVEL_BOUNDS="3 2").startswith("RSM_LEVEL_BOUNDS must be strictly increasing")
    said = error_of(monkeypatch, RSM_NAMESPACE="a b")
    assert said.startswith("RSM_NAMESPACE must be 1 to 128 characters from ")
    assert "a b" not in said


def test_an_engine_is_explained_by_its_options() -> None:
    wrong: Any = {"engine_id": "e", "gpu_id": -1, "backend": "openai", "base_url": "http://h", "engine_scheduler": "x"}
    with pytest.raises(ValidationError) as caught:
        EngineConfig(**wrong)
    said = explain(caught.value, lambda name: f"--{name}")
    assert "--gpu_id: Input should be greater than or equal to 0." in said
    assert "--engine_scheduler: Input should be 'fcfs', 'priority' or 'plas'." in said


@pytest.mark.parametrize("module", ["rsm.router", "rsm.workers"])
def test_programs_say_so_in_one_line(module: str) -> None:
    env = clean_env() | {"RSM_LEASE_MS": SECRET, "RSM_ENGINE": '{"engine_id":"e"}'}
    command = [sys.executable, "-P", "-m", module]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (78, f"{SAID['RSM_LEASE_MS']}\n")


def test_the_command_says_so_in_one_line() -> None:
    done = run("ps", env=clean_env() | {"RSM_LEASE_MS": SECRET})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{SAID['RSM_LEASE_MS']}\n")
    done = run("worker", "--engine-id", "a b", "--backend", "sim")
    assert done.returncode == 2
    assert done.stderr.startswith("--engine-id: engine_id must be 1 to 128 characters")
    done = run("worker", "--engine-id", "a", "--backend", "openai")
    assert done.stderr == 'backend "openai" needs base_url, such as http://host:8000/v1.\n'


def test_an_unknown_routing_policy(tmp_path: Path) -> None:
    """`rsm up` starts nothing. A router alone logs one error, and is not started again."""
    env = clean_env() | {"RSM_POLICY": "nonsense", "RSM_DATA_DIR": str(tmp_path)}
    sentence = "There is no routing policy 'nonsense' (No module named 'nonsense'). Use one of autellix, "
    done = run("up", "--backend", "sim", env=env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(sentence)
    assert done.stderr.endswith("(RSM_POLICY).\n")
    assert "e0" not in done.stderr
    for command in ([RSM, "router"], [sys.executable, "-P", "-m", "rsm.router"]):
        alone = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert alone.returncode == 78
        (line,) = alone.stderr.splitlines()
        assert sentence in line
