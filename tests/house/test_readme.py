"""Runs everything that the README and docs/operations.md show, against a real `rsm up`."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.paths import ROOT
from tests.support.waiting import eventually

README = (ROOT / "README.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
RSM = Path(sys.executable).with_name("rsm")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line[2:] for block in blocks("console") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("rsm ")]


@pytest.fixture(scope="module")
def up() -> Iterator[dict[str, str]]:
    """Runs the README's first command, with its own state folder. Yields the environment that finds it."""
    start = commands()[0]
    assert start[:2] == ["rsm", "up"]
    with tempfile.TemporaryDirectory(prefix="rsm-readme-") as folder, open(os.devnull, "w") as nowhere:
        env = {k: v for k, v in os.environ.items() if not k.startswith("RSM_")} | {"RSM_DATA_DIR": folder}
        process = subprocess.Popen([str(RSM), *start[1:]], env=env, stdout=nowhere, stderr=nowhere)
        try:
            socket = Path(folder) / "redis.sock"
            eventually(socket.exists, 30)
            server = redis.Redis(unix_socket_path=str(socket))
            eventually(lambda: len(server.zrange("{rsm}:engines", 0, -1)) == 2, 30)
            eventually(lambda: all(server.hget(f"{{rsm}}:engine:e{i}", "state") == b"READY" for i in range(2)), 30)
            server.close()
            yield env
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0


def test_the_line_that_puts_rsm_on_the_path() -> None:
    (line,) = [line[2:] for block in blocks("console") for line in block.splitlines() if "activate" in line]
    here = line.replace(".venv", shlex.quote(sys.prefix))
    done = subprocess.run(["sh", "-c", f"{here} && command -v rsm"], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == str(RSM), done.stderr


def test_a_bare_xadd_as_shown(up: dict[str, str]) -> None:
    assert b'"text"' in push_as_shown(up)


def push_as_shown(up: dict[str, str]) -> bytes:
    """Pushes call c1 as the README shows, waits for it and returns the result. Repeatable: the id is the same."""
    server: Any = redis.Redis(unix_socket_path=f"{up['RSM_DATA_DIR']}/redis.sock")
    push, state, result = (shlex.split(line) for line in blocks("redis")[0].splitlines())
    server.execute_command(*push)
    eventually(lambda: server.execute_command(*state) == b"COMPLETED", 10)
    answer: bytes = server.execute_command(*result)
    server.close()
    return answer


@pytest.mark.parametrize("command", commands()[1:], ids=" ".join)
def test_a_command_as_shown(up: dict[str, str], command: list[str]) -> None:
    assert command[0] == "rsm"
    push_as_shown(up)
    done = subprocess.run([str(RSM), *command[1:]], env=up, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


# A finish reason and a message; a partial text that is not empty; the engine that the snippet has started.
SHOWN = (r"length\n\{.*'content'", r"cancelled\n.*user left.* '.+'", r" mine-[01] ")


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_snippet_as_shown(up: dict[str, str], number: int) -> None:
    code = blocks("python")[number]
    done = subprocess.run([sys.executable, "-c", code], env=up, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(SHOWN[number], done.stdout), done.stdout


def test_the_custom_policy_as_shown(tmp_path: Path) -> None:
    (code,) = blocks("python", OPERATIONS)
    assert re.findall(r"^(?:from|import) (rsm\S*)", code, re.MULTILINE) == ["rsm.router"], "plug-ins need nothing else"
    (tmp_path / "my_policy.py").write_text(code)
    lines = ("from rsm.broker import Settings", "from rsm.router.policies import create_policy")
    check = "\n".join([*lines, "print(create_policy(Settings()))"])
    env = os.environ | {"RSM_POLICY": "my_policy:FewestCalls", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True, timeout=60)
    assert "FewestCalls" in done.stdout, done.stderr


def test_the_figures_are_from_a_benchmark_run() -> None:
    from bench.queue.page import excerpt

    assert excerpt(ROOT / "bench" / "results" / "broker.md") in PERFORMANCE


def test_every_setting_is_documented() -> None:
    from rsm.broker import Settings

    for name in Settings.model_fields:
        assert f"RSM_{name.upper()}" in OPERATIONS, f"RSM_{name.upper()} is missing in docs/operations.md"
