"""An editable install, as type checkers see it from a user's file outside the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.deploy.installs import fresh_env

pytestmark = pytest.mark.timeout(300)

PACKAGES = ("rsm", "rsm.broker", "rsm.router", "rsm.workers", "rsm.engine", "rsm.frontend")
# A checker that does not find the package takes everything for Any, and would miss the errors in _WRONG.
_USES = """
def text() -> str:
    with rsm.Client() as client:
        return client.submit("hi", session="s", max_tokens=8).result().text


async def engine(manager: rsm.MultiEngineManager) -> str:
    future = await manager.submit_request("s", "hi")
    return (await future).engine_id
"""
_WRONG = """
import rsm

number: int = rsm.Client().submit("hi").result().text
rsm.MultiEngineManager(routers="two")
from rsm.broker import Nonsense
"""


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A folder with a file that uses every public name, and a file with errors on three lines."""
    lines = ["import rsm"]
    for i, package in enumerate(PACKAGES):
        names = import_module(package).__all__
        assert names
        lines += [f"from {package} import {name} as {name}_{i}" for name in names]
    (tmp_path / "right.py").write_text("\n".join(lines) + "\n\n" + _USES)
    (tmp_path / "wrong.py").write_text(_WRONG)
    # pyright's rules; the additional ones of basedpyright are about style.
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "reportUnusedImport": false}')
    return tmp_path


def check(folder: Path, *command: str) -> str:
    program = Path(sys.executable).with_name(command[0])
    env = fresh_env(MYPY_CACHE_DIR=str(folder / "cache"))
    done = subprocess.run(
        [program, *command[1:], "right.py", "wrong.py"],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_mypy(editable_python: Path, user: Path) -> None:
    printed = check(user, "mypy", "--strict", "--no-error-summary", f"--python-executable={editable_python}")
    errors = [line.split(":")[:2] for line in printed.splitlines() if ": error: " in line]
    assert errors == [["wrong.py", str(n)] for n in (4, 5, 6)], printed


def test_pyright(editable_python: Path, user: Path) -> None:
    found = json.loads(check(user, "basedpyright", "--outputjson", "--pythonpath", str(editable_python)))
    errors = {(Path(e["file"]).name, e["range"]["start"]["line"] + 1) for e in found["generalDiagnostics"]}
    assert errors == {("wrong.py", n) for n in (4, 5, 6)}, found["generalDiagnostics"]
