"""`rsm demo`: its own checks pass, and it leaves nothing behind but the log of a failure."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rsm_command import RSM, clean_env, run
from tests.support.waiting import eventually


@pytest.fixture
def folder() -> Iterator[Path]:
    """The demo's place for temporary folders. Its path is short, because a socket is among them."""
    made = Path(f"/tmp/rsm-demo-{os.getpid()}")
    made.mkdir()
    yield made
    shutil.rmtree(made)


def play(backend: str, folder: Path, timeout_s: float) -> str:
    done = run("demo", "--backend", backend, env=clean_env() | {"TMPDIR": str(folder)}, timeout_s=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All checks passed" in done.stdout
    assert "lost: 0" in done.stdout
    assert "✗" not in done.stdout
    assert list(folder.glob("rsm-*")) == []
    return done.stdout


@pytest.mark.timeout(180)
def test_demo_with_simulated_engines(folder: Path) -> None:
    assert "text is meaningless" in play("sim", folder, 150)
    assert list(folder.iterdir()) == []


def test_a_demo_that_fails_keeps_its_log_and_says_where(folder: Path) -> None:
    """Here it cannot start its Redis: the path of the socket would be too long."""
    deep = folder / ("x" * 100)
    deep.mkdir()
    done = run("demo", "--backend", "sim", env=clean_env() | {"TMPDIR": str(deep)})
    assert (done.returncode, done.stderr) == (1, "")
    assert "✗ FAILED: the demo runs to its end: The path" in done.stdout
    (left,) = deep.iterdir()
    assert [path.name for path in left.iterdir()] == ["processes.log"]
    assert done.stdout.splitlines()[-1] == f"The log of its processes: {left}/processes.log"


def test_a_check_that_fails_keeps_the_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rsm.cli.demo import acts, story
    from rsm.cli.demo.stage import Stage

    def fail(stage: Stage) -> float:
        stage.check(False, "two and two are five")
        return 0.0

    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(acts, "stream_one", fail)
    for act in ("follow_an_agent", "cancel_a_session", "kill_an_engine", "count_all_calls"):
        monkeypatch.setattr(acts, act, lambda *_: None)
    assert not story.run_demo("sim", chosen=False)
    printed = capsys.readouterr().out
    assert "vLLM is not installed." in printed
    (log,) = folder.glob("*/processes.log")
    assert printed.splitlines()[-4:] == [
        "",
        "1 check FAILED:",
        "  two and two are five",
        f"The log of its processes: {log}",
    ]
    assert "e0 is ready" in log.read_text(), "the workers' log, and no other file"
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["processes.log"]


def test_ctrl_c_ends_the_demo_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    printed = tmp_path / "out"
    with printed.open("wb") as out:
        command, env = [RSM, "demo", "--backend", "sim"], clean_env() | {"TMPDIR": str(folder)}
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.DEVNULL)
    eventually(lambda: "Ready after" in printed.read_text(), 60)
    assert list(folder.glob("rsm-demo-*/processes.log"))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert list(folder.iterdir()) == []


@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(400)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_demo_with_vllm(folder: Path) -> None:
    assert "Only its text is meaningless" in play("vllm", folder, 360)
