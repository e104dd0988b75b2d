"""deploy/Dockerfile: it copies all that is needed, and the image runs as documented.

Tests have no Docker. `dockerfile.build` runs the lines of the first stage, and `Container` stands in for a container.
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
# Files that may be in a checkout but must not be in the image.
_JUNK = (
    ".env",
    ".git/config",
    ".venv/bin/python",
    "broker/__pycache__/settings.cpython-311.pyc",
    "build/lib/rsm/old.py",
)
_TIMEOUT_S = 60


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """A folder with the checkout, and with `src` and `venv` of the first stage. Every user may read it."""
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
    """The last stage: its environment, its user, its volumes, and the folder that it copies from the first stage."""
    last = stages(_DOCKERFILE)[-1]
    (user,) = last.said("USER")
    number = int(user.partition(":")[0])
    folder = Path(tempfile.mkdtemp(prefix="rsm-volumes-"))
    folder.chmod(0o755)
    volumes = {name: folder / name.replace("/", "-") for name in json.loads(*last.said("VOLUME"))}
    for volume in volumes.values():
        volume.mkdir()
        volume.chmod(0o770)
        if os.geteuid() == 0:
            os.chown(volume, 0, number)  # only the group may write, as on Kubernetes; Docker gives it to the user
    replaced = {_PLACE: built / "venv"} | ({} if namespaces() else volumes)
    env = {}
    for variable, value in (last.environment({"PATH": "/usr/bin:/bin"})).items():
        for old, new in replaced.items():
            value = value.replace(old, str(new))
        env[variable] = value
    yield Container([built / "venv"], number, env, volumes)
    shutil.rmtree(folder)


def run(container: Container, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        container.command(*words), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd="/"
    )


# -- the Dockerfile


def test_it_runs_as_a_user_with_a_fixed_id_and_needs_no_home() -> None:
    last = stages(_DOCKERFILE)[-1]
    (user,) = last.said("USER")
    number, _, group = user.partition(":")
    assert int(number) == int(group) > 0
    assert "HOME" not in last.environment({})
    assert last.lines[-1] == ("CMD", '["rsm", "router"]')


def test_it_writes_only_to_volumes() -> None:
    last = stages(_DOCKERFILE)[-1]
    volumes = json.loads(*last.said("VOLUME"))
    written = {n: v for n, v in last.environment({}).items() if v.startswith("/") and n not in ("PATH", "VENV")}
    assert {"RSM_DATA_DIR", "XDG_CACHE_HOME"} <= written.keys()
    assert [n for n, value in written.items() if not any(Path(value).is_relative_to(v) for v in volumes)] == []


def test_its_labels_match_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (labels,) = stages(_DOCKERFILE)[-1].said("LABEL")
    for name, value in (
        ("title", project["name"]),
        ("description", project["description"]),
        ("licenses", project["license"]),
    ):
        assert f'org.opencontainers.image.{name}="{value}"' in labels


# -- its content


def test_junk_in_a_checkout_is_not_in_the_context(built: Path) -> None:
    found = {str(path) for path in context(built / "checkout")}
    assert "rsm/broker" in found, "a link"
    assert "broker/protocol/lua/transitions/submit.lua" in found
    assert not found & set(_JUNK)
    tops = {name.partition("/")[0] for name in found}
    assert tops.isdisjoint({"bench", "chaos", "deploy", "docs", "examples", "spec", "tests"})


def test_it_copies_the_whole_package(built: Path, wheel: Path) -> None:
    (site,) = (built / "venv" / "lib").glob("python*/site-packages")
    installed = {str(path.relative_to(site)) for path in (site / "rsm").rglob("*") if path.is_file()}
    packed = {name for name in ZipFile(wheel).namelist() if name.startswith("rsm/")}
    assert {name for name in installed if "__pycache__" not in name} == packed


# -- how it runs


def test_the_container_is_isolated(container: Container) -> None:
    """Otherwise the tests below would prove nothing."""
    assert run(container, "id", "-u").stdout.strip() == str(container.user if os.geteuid() == 0 else os.geteuid())
    assert not [line for line in run(container, "env").stdout.splitlines() if line.startswith("HOME=")]
    if not namespaces():
        pytest.skip("no mount namespaces here: another user and no HOME, but no read-only root")
    for folder in ("/", "/var", "/usr", "/etc", str(container.image[0])):
        assert "Read-only file system" in run(container, "touch", f"{folder}/proof").stderr, folder
    for folder in ("/tmp", *container.volumes):
        assert run(container, "touch", f"{folder}/proof").returncode == 0, folder


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
        eventually(lambda: "Ready: e0, e1" in log.read_text() or process.poll() is not None, _TIMEOUT_S)
        assert process.poll() is None, log.read_text()
        done = run(container, "rsm", "submit", "hi", "--max-tokens", "4")
        assert (done.returncode, len(done.stdout.split())) == (0, 4), done.stderr
        assert json.loads(run(container, "rsm", "stats", "--json").stdout)["completed"] == 1
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(_TIMEOUT_S) == 0, log.read_text()
