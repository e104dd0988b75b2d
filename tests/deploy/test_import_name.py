"""One import name, `rsm`: the content of the wheel, and a project whose own modules have the names of our rooms."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.installs import fresh_env
from tests.support.paths import ROOT

pytestmark = pytest.mark.timeout(300)

PROBE = Path(__file__).with_name("probe.py")
ROOMS = ("broker", "cli", "engine", "router", "simulation", "workers")
_HOSTILE = """
from pathlib import Path

Path(__file__).with_suffix(".ran").touch()
raise RuntimeError(f"{__name__} belongs to the project, not to rsm-engine")
"""


def output(*command: str | Path, cwd: Path = Path("/"), **env: str) -> str:
    done = subprocess.run(command, env=fresh_env(**env), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- the wheel


def test_the_wheel_holds_rsm_and_nothing_else(wheel: Path) -> None:
    files = {
        f"rsm/{path.relative_to(ROOT)}"
        for room in ROOMS
        for suffix in ("py", "lua")
        for path in (ROOT / room).rglob(f"*.{suffix}")
    }
    files |= {f"rsm/{name}" for name in ("__init__.py", "__main__.py", "frontend.py", "py.typed")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == files
    assert any(name.endswith(".lua") for name in files)
    (top_level,) = (name for name in names if name.endswith("/top_level.txt"))
    assert zipfile.ZipFile(wheel).read(top_level).split() == [b"rsm"]


def test_imports_of_the_first_users_work(all_python: Path) -> None:
    code = """
import rsm, rsm.engine, rsm.frontend
from rsm.engine import EngineConfig, MultiEngineManager
from rsm.frontend import GlobalProcessTable, SessionManager
assert rsm.MultiEngineManager is MultiEngineManager and rsm.EngineConfig is EngineConfig
assert rsm.engine.SessionManager is SessionManager and rsm.engine.GlobalProcessTable is GlobalProcessTable
assert rsm.Client.__module__.startswith("rsm.broker.")
print(rsm.__file__)
"""
    assert Path(output(all_python, "-c", code).strip()).is_relative_to(all_python.parents[1])


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_not_importable_without_rsm(all_python: Path, room: str) -> None:
    code = f"from importlib.util import find_spec; print(find_spec({room!r}))"
    assert output(all_python, "-c", code) == "None\n"


def test_in_a_checkout_the_folder_engine_is_importable() -> None:
    code = """
import rsm.engine
from engine import EngineConfig, MultiEngineManager
assert MultiEngineManager is rsm.engine.MultiEngineManager and EngineConfig is rsm.engine.EngineConfig
"""
    output(sys.executable, "-c", code, cwd=ROOT)


# -- in a project with modules of these names


@pytest.fixture
def project() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="rsm-project-"))
    (folder / "workers").mkdir()
    for name in ("broker", "cli", "engine", "frontend", "router", "simulation", "workers/__init__"):
        (folder / f"{name}.py").write_text(_HOSTILE)
    shutil.copy(PROBE, folder / "app.py")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("start", [("app.py",), ("-m", "app")], ids=" ".join)
def test_a_project_with_modules_named_like_our_rooms(all_python: Path, project: Path, start: tuple[str, ...]) -> None:
    """Its folder is the working folder and first on the import path; in one case, in our child processes, too.

    The probe uses clients, a manager with its router and workers, a node, remote engines, and the `rsm` command."""
    more = {"PYTHONPATH": str(project)} if start[0] == "-m" else {}
    printed = output(all_python, *start, cwd=project, **more)
    assert printed.endswith(f"everything works, from {all_python.parents[1]}/lib/{_python()}/site-packages/rsm\n")
    assert ran(project) == []


def test_the_hostile_modules_fail_if_imported(all_python: Path, project: Path) -> None:
    for name in ("router", "workers"):
        with pytest.raises(AssertionError, match=f"{name} belongs to the project"):
            output(all_python, "-c", f"import {name}", cwd=project)
    assert ran(project) == ["__init__.ran", "router.ran"]


def ran(project: Path) -> list[str]:
    return sorted(path.name for path in project.rglob("*.ran"))


def _python() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"
