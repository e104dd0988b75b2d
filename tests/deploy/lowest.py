"""`make lowest`: checks that everything works with the lowest dependencies that pyproject.toml allows.

Starts from an environment with the pinned versions. Tries each direct dependency at its lowest version, first one by
one, then all at once. Exits with status 1 if a version does not work: then raise its minimum.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.deploy.installs import ALL, BASE, build_wheel, copy_checkout, fresh_env, install, install_pinned, make_venv
from tests.support.paths import ROOT

PROBE = Path(__file__).with_name("probe.py")
# Extras for developers, or whose right build depends on the machine.
_LEFT_OUT = {"all", "dev", "vllm"}
_TIMEOUT_S = 300


def lowest_versions() -> Iterator[str]:
    """Each direct dependency of the base and the extras, pinned to its lowest version: "redis[hiredis]==6.4"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for wanted in [*project["dependencies"], *(w for name in extras.keys() - _LEFT_OUT for w in extras[name])]:
        name, lowest = re.match(r"([\w\[\]-]+)>=([\d.]+)", wanted).groups()  # type: ignore[union-attr]
        yield f"{name}=={lowest}"


def failure(python: Path) -> str:
    """The last line of the probe's error. Empty if everything works."""
    command = [str(python), "-P", str(PROBE)]
    try:
        done = subprocess.run(
            command, env=fresh_env(), cwd="/", capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not finished after {_TIMEOUT_S} s"
    return "" if done.returncode == 0 else (done.stderr.strip() or "no error message").splitlines()[-1]


def try_out(python: Path, *lowest: str) -> bool:
    """Tries these versions, with the pinned ones for the other packages."""
    try:
        install(python, *lowest)
        wrong = failure(python)
    except AssertionError as e:
        wrong = str(e).strip().splitlines()[-1]
    print(f"{', '.join(lowest)}: {wrong or 'works'}", flush=True)
    return not wrong


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="rsm-lowest-") as name:
        folder = Path(name)
        copy_checkout(folder / "source")
        wheel = build_wheel(folder / "source", folder)
        python = make_venv(folder / "venv")
        fine = True
        for lowest in [[version] for version in sorted(lowest_versions())] + [sorted(lowest_versions())]:
            install_pinned(python, wheel, BASE, ALL)
            fine &= try_out(python, *lowest)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
