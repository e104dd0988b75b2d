"""The scheduler plug-in with the real Scheduler class of each supported version of vLLM, sync and async.

Each version runs in a process of its own (`scheduler_cases.py`), with a model runner made of dictionaries. The
installed one always runs; the others run once `make vllm-versions` has fetched them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache

import pytest

from tests.support.paths import ROOT
from tests.support.vllm import scheduler_cases as vllm_scheduler_cases
from tests.support.vllm.versions import VERSIONS, installed, path_of

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(600)]

_NAMES = [f"{name}[{mode}]" for name, _ in vllm_scheduler_cases.cases() for mode in ("sync", "async")]


@cache
def outcome(version: str) -> dict[str, str]:
    """The error of each case; "" = none."""
    folder = path_of(version)
    if not installed() or (version != installed() and folder is None):
        pytest.skip(f"vLLM {version} is missing: {'make vllm-versions' if installed() else 'vLLM is not installed'}")
    path = [str(ROOT)] if version == installed() else [str(folder), str(ROOT)]
    command = [sys.executable, "-m", "tests.support.vllm.scheduler_cases"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["version"] == version
    cases: dict[str, str] = report["cases"]
    return cases


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("version", dict.fromkeys((installed() or "any", *VERSIONS)))
def test_the_scheduler_of_each_version(version: str, name: str) -> None:
    assert not outcome(version)[name]


def test_the_oldest_and_the_newest_allowed_version_are_tested() -> None:
    (line,) = (li for li in (ROOT / "pyproject.toml").read_text().splitlines() if li.startswith("vllm = "))
    found = re.search(r">=([\d.]+),<0\.(\d+)", line)
    assert found is not None
    assert found[1] in VERSIONS
    assert f"0.{int(found[2]) - 1}" in {version.rpartition(".")[0] for version in VERSIONS}
