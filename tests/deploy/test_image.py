"""deploy/Dockerfile: what it copies is enough, and what comes of it runs as it promises.

There is no Docker here: `dockerfile.build` runs the first stage's own lines, and `Container` is the place they run in.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import typer

from rsm.cli import app
from tests.deploy.container import Container, namespaces
from tests.deploy.dockerfile import build, context, stages
from tests.deploy.installs import copy_checkout
from tests.support.paths import ROOT
from tests.support.waiting import eventually

pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("image")]

_DOCKERFILE = ROOT / "deploy" / "Dockerfile"
_PLACE = "/opt/rsm-engine"
# What lies about in a checkout, and is nobody's business.
_JUNK = (
    ".env",
    ".git/config",
    ".venv/bin/python",
    "broker/__pycache__/settings.cpython-311.pyc",
    "build/lib/rsm/old.py",
)
_PATIENCE_S = 60


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """A folder with the checkout, and `src` and `venv` as the first stage leaves them, which any user may read."""
    with tempfile.TemporaryDirectory(prefix="rsm-image-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        copy_checkout(folder / "checkout")
        for junk in _JUNK:
            path = folder / "checkout" / junk
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        build(folder / "checkout", folder, VENV=str(folder / "venv"))
        yield folder


@pytest.fixture
def container(built: Path) -> Iterator[Container]:
    """The last stage: its environment, its user, its volumes, and the folder that it copies from the first."""
    last = stages(_DOCKERFILE)[-1]
    (user,) = last.said("USER")
    number = int(user.partition(":")[0])
    places = Path(tempfile.mkdtemp(prefix="rsm-volumes-"))
    places.chmod(0o755)
    volumes = {name: places / name.replace("/", "-") for name in json.loads(*last.said("VOLUME"))}
    for place in volumes.values():
        place.mkdir()
        place.chmod(0o770)
        if os.geteuid() == 0:
            os.chown(place, 0, number)  # the group's alone, as Kubernetes does it; Docker gives it to the user
    replaced = {_PLACE: built / "venv"} | ({} if namespaces() else volumes)
    env = {}
    for variable, value in (last.environment({"PATH": "/usr/bin:/bin"})).items():
        for old, new in replaced.items():
            value = value.replace(old, str(new))
        env[variable] = value
    yield Container([built / "venv"], number, env, volumes)
    shutil.rmtree(places)


def run(container: Container, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        container.command(*words), capture_output=True, text=True, timeout=_PATIENCE_S, check=False, cwd="/"
    )


# -- what it says


def test_it_runs_as_a_user_with_a_fixed_number_and_needs_no_home() -> None:
    last = stages(_DOCKERFILE)[-1]
    (user,) = last.said("USER")
    number, _, group = user.partition(":")
    assert int(number) == int(group) > 0
    assert "HOME" not in last.environment({})
    assert last.lines[-1] == ("CMD", '["rsm", "router"]')


def test_all_that_is_written_goes_to_a_volume() -> None:
    last = stages(_DOCKERFILE)[-1]
    volumes = json.loads(*last.said("VOLUME"))
    written = {n: v for n, v in last.environment({}).items() if v.startswith("/") and n not in ("PATH", "VENV")}
    assert {"RSM_DATA_DIR", "XDG_CACHE_HOME"} <= written.keys()
    assert [n for n, value in written.items() if not any(Path(value).is_relative_to(v) for v in volumes)] == []


def test_its_labels_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (labels,) = stages(_DOCKERFILE)[-1].said("LABEL")
    for name, value in (
        ("title", project["name"]),
        ("description", project["description"]),
        ("licenses", project["license"]),
    ):
        assert f'org.opencontainers.image.{name}="{value}"' in labels


# -- what it is made of


def test_what_lies_about_in_a_checkout_does_not_get_into_the_context(built: Path) -> None:
    found = {str(path) for path in context(built / "checkout")}
    assert "rsm/broker" in found, "a link"
    assert "broker/protocol/lua/transitions/submit.lua" in found
    assert not found & set(_JUNK)
    tops = {name.partition("/")[0] for name in found}
    assert tops.isdisjoint({"bench", "chaos", "deploy", "docs", "examples", "spec", "tests"})


def test_what_it_copies_is_the_whole_package(built: Path, wheel: Path) -> None:
    (site,) = (built / "venv" / "lib").glob("python*/site-packages")
    installed = {str(path.relative_to(site)) for path in (site / "rsm").rglob("*") if path.is_file()}
    packed = {name for name in ZipFile(wheel).namelist() if name.startswith("rsm/")}
    assert {name for name in installed if "__pycache__" not in name} == packed


# -- how it runs


def test_the_place_it_runs_in_is_as_bare_as_promised(container: Container) -> None:
    """Else the tests below would show nothing."""
    assert run(container, "id", "-u").stdout.strip() == str(container.user if os.geteuid() == 0 else os.geteuid())
    assert not [line for line in run(container, "env").stdout.splitlines() if line.startswith("HOME=")]
    if not namespaces():
        pytest.skip("no mount namespaces here: another user and no HOME, but no read-only root")
    for place in ("/", "/var", "/usr", "/etc", str(container.image[0])):
        assert "Read-only file system" in run(container, "touch", f"{place}/proof").stderr, place
    for place in ("/tmp", *container.volumes):
        assert run(container, "touch", f"{place}/proof").returncode == 0, place


def every_command() -> list[list[str]]:
    def walk(command: Any, words: list[str]) -> Iterator[list[str]]:
        yield words
        for name, below in getattr(command, "commands", {}).items():
            yield from walk(below, [*words, name])

    return list(walk(typer.main.get_command(app), []))


def test_its_version_and_every_help(container: Container) -> None:
    assert run(container, "rsm", "--version").stdout.startswith("rsm-engine ")
    commands = every_command()
    assert ["dead", "replay"] in commands
    with ThreadPoolExecutor(2) as pool:
        for words, done in zip(
            commands, pool.map(lambda w: run(container, "rsm", *w, "--help"), commands), strict=True
        ):
            assert done.returncode == 0, (words, done.stderr)
            assert "Usage:" in done.stdout
            assert done.stderr == ""


def test_up_serves_a_call_and_ends_on_a_signal(container: Container, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        command = container.command("rsm", "up", "--backend", "sim", "--engines", "2")
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd="/")
    try:
        eventually(lambda: "Ready: e0, e1" in log.read_text() or process.poll() is not None, _PATIENCE_S)
        assert process.poll() is None, log.read_text()
        done = run(container, "rsm", "submit", "hi", "--max-tokens", "4")
        assert (done.returncode, len(done.stdout.split())) == (0, 4), done.stderr
        assert json.loads(run(container, "rsm", "stats", "--json").stdout)["completed"] == 1
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(_PATIENCE_S) == 0, log.read_text()
