"""spec/broker.pml, checked by spin: every schedule of a small broker with faults, and mutants that must be caught."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SPEC = ROOT / "spec" / "broker.pml"
MISSING = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
MEMORY_MB = 2000
TIMEOUT_S = 300

# The limits of the runs. Together they have every fault, and most pairs of faults.
WORLDS = {
    "deaths": ["PRODUCERS=1", "LOSSES=0", "ROUTER_CRASHES=0"],
    "replies": ["PRODUCERS=1", "LOSSES=2", "LAPSES=0", "CANCELS=0"],
    "pauses": ["PRODUCERS=1", "CRASHES=0", "ROUTER_CRASHES=0", "CANCELS=0"],
    "calls": ["PRODUCERS=2", "LOSSES=0", "LAPSES=0", "ROUTER_CRASHES=0", "CANCELS=0"],
}
# The safeguard that each mutant removes, and the worlds that must detect it.
MUTANTS = {
    "NO_ATTEMPT": "deaths",
    "NO_GENERATION": "deaths",
    "REAP_WITHOUT_ATTEMPT": "deaths",
    "REGISTER_FORGETS": "deaths",
    "CLAIM_WITHOUT_LEASE": "deaths",
    "CANCEL_IGNORED": "deaths",
    "NO_CLAIM_NUMBER": "replies",
    "NO_CHUNK_NUMBER": "replies",
    "FINISH_TWICE": "replies",
    "TAKE_ON_READ": "replies",
}


@pytest.fixture(autouse=True)
def tools() -> None:
    if MISSING and os.environ.get("RSM_TEST_REQUIRE_SPIN") != "1":
        pytest.skip(f"{' and '.join(MISSING)} not installed (Debian: apt-get install spin gcc)")
    assert not MISSING, f"RSM_TEST_REQUIRE_SPIN=1, and {MISSING} not installed"


def check(folder: Path, world: str, *defines: str, cycles: bool = False) -> str:
    """Runs spin, gcc and the checker; returns what the checker says."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        return done.stdout

    run("spin", "-a", *(f"-D{d}" for d in [*WORLDS[world], *defines]), str(SPEC))
    run("gcc", "-O2", f"-DMEMLIM={MEMORY_MB}", "-DNP" if cycles else "-DSAFETY", "-o", "pan", "pan.c")
    began = time.monotonic()
    said = run("./pan", "-n", "-m100000", *(["-l"] if cycles else []))
    states = re.search(r"(\d+) states, stored", said)
    print(f"{world} {' '.join(defines)}: {states[1] if states else '?'} states, {time.monotonic() - began:.1f} s")
    return said


def errors(said: str) -> int:
    found = re.search(r"errors: (\d+)", said)
    assert found, said
    return int(found[1])


@pytest.mark.parametrize("world", WORLDS)
def test_no_call_is_lost_or_ended_twice(tmp_path: Path, world: str) -> None:
    said = check(tmp_path, world)
    assert errors(said) == 0, said
    assert "Search not completed" not in said


@pytest.mark.parametrize("world", ["replies", "pauses"])
def test_every_run_is_finite(tmp_path: Path, world: str) -> None:
    """Without cycles, a property of all final states holds at the end of every run."""
    said = check(tmp_path, world, cycles=True)
    assert errors(said) == 0, said
    assert "Search not completed" not in said


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broker_without_one_of_its_safeguards_is_caught(tmp_path: Path, mutant: str) -> None:
    assert errors(check(tmp_path, MUTANTS[mutant], mutant)) == 1
