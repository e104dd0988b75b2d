"""`rsm demo`: it says itself whether all was as promised."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rsm_command import clean_env, run


@pytest.fixture
def folder() -> Iterator[Path]:
    """For the demo's temporary folders; short, because a socket is among them."""
    made = Path(f"/tmp/rsm-demo-{os.getpid()}")
    made.mkdir()
    yield made
    shutil.rmtree(made)


def play(backend: str, folder: Path, timeout_s: float) -> str:
    done = run("demo", "--backend", backend, env=clean_env() | {"TMPDIR": str(folder)}, timeout_s=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All as promised" in done.stdout
    assert "lost: 0" in done.stdout
    assert "NOT" not in done.stdout
    return done.stdout


@pytest.mark.timeout(180)
def test_demo_with_simulated_engines(folder: Path) -> None:
    assert "of no model" in play("sim", folder, 150)


@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(400)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_demo_with_vllm(folder: Path) -> None:
    assert "the text is noise" in play("vllm", folder, 360)
