"""Wheels and fresh environments, made with pip as users make them. A package registry must be reachable."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT
from tests.support.rsm_command import clean_env

BASE = ROOT / "requirements" / "base.txt"
ALL = ROOT / "requirements" / "all.txt"
# Untracked files of a checkout: environments, caches, old builds.
_UNTRACKED = shutil.ignore_patterns(
    ".git", ".venv", ".bench", ".*_cache", ".hypothesis", "__pycache__", "build", "*.egg-info"
)
_PYTHON_VARIABLES = {"PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV"}


def fresh_env(**more: str) -> dict[str, str]:
    """The environment without our settings, and without variables that lead back into this checkout."""
    return {name: value for name, value in clean_env().items() if name not in _PYTHON_VARIABLES} | more


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, once for all test processes of a run."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = base / f"rsm-{name}", base / f"rsm-{name}.made"
    with (base / f"rsm-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a failed attempt
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


def copy_checkout(to: Path) -> None:
    """Copies the checkout: builds leave files behind, and two builds in one folder disturb each other."""
    shutil.copytree(ROOT, to, symlinks=True, ignore=_UNTRACKED, dirs_exist_ok=True)


def build_wheel(source: Path, to: Path) -> Path:
    _run(sys.executable, "-m", "pip", "wheel", *_QUIET, "--no-deps", "--wheel-dir", str(to), str(source))
    (wheel,) = to.glob("*.whl")
    return wheel


def make_venv(folder: Path) -> Path:
    """Makes an empty environment and returns its Python. It has no pip: `install` uses that of this process."""
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    return folder / "bin" / "python"


def install(python: Path, *what: str) -> None:
    """Runs `pip install` for another environment."""
    _run(sys.executable, "-m", "pip", "--python", str(python), "install", *_QUIET, *what)


def install_pinned(python: Path, wheel: Path | str, *pins: Path) -> None:
    """Installs the wheel and exactly the pinned packages. Then lets pip check that nothing is missing."""
    requirements = [word for path in pins for word in ("--requirement", str(path))]
    install(python, "--no-deps", *requirements, str(wheel))
    _run(sys.executable, "-m", "pip", "--python", str(python), "check", *_QUIET)


def distributions(python: Path) -> dict[str, str]:
    """The installed packages: normalized names and versions."""
    frozen = _run(sys.executable, "-m", "pip", "--python", str(python), "list", "--format", "freeze", _QUIET[1])
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in frozen.split())}


def pins(*files: Path) -> dict[str, str]:
    """The versions that requirements files pin for this Python."""
    lines = [line for path in files for line in path.read_text().splitlines() if line and line[0] not in "#-"]
    requirements = [Requirement(line) for line in lines]
    return {
        canonicalize_name(need.name): str(need.specifier).removeprefix("==")
        for need in requirements
        if need.marker is None or need.marker.evaluate()
    }


_QUIET: Sequence[str] = ("--quiet", "--disable-pip-version-check")


def _run(*command: str) -> str:
    done = subprocess.run(command, env=fresh_env(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
