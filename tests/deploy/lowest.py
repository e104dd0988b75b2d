"""`make lowest`: does everything still work with a direct dependency at the lowest version that pyproject.toml allows?

One environment with the pinned versions; in it each dependency in turn at its lowest, alone, then all of them at once.
Exit status 1 if one does not do; then raise its minimum to what does.
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
# Of these the right build depends on the machine, or they are for developers.
_LEFT_OUT = {"all", "dev", "vllm"}
_PATIENCE_S = 300


def floors() -> Iterator[str]:
    """Each direct dependency of the base and the extras, pinned at its lowest: "redis[hiredis]==6.4"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for wanted in [*project["dependencies"], *(w for name in extras.keys() - _LEFT_OUT for w in extras[name])]:
        name, lowest = re.match(r"([\w\[\]-]+)>=([\d.]+)", wanted).groups()  # type: ignore[union-attr]
        yield f"{name}=={lowest}"


def what_fails(python: Path) -> str:
    """The last line of what the probe says there; "" if all of it works."""
    command = [str(python), "-P", str(PROBE)]
    try:
        done = subprocess.run(
            command, env=fresh_env(), cwd="/", capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end within {_PATIENCE_S} s"
    return "" if done.returncode == 0 else (done.stderr.strip() or "no word").splitlines()[-1]


def try_out(python: Path, *lowest: str) -> bool:
    """With these versions, and the pinned ones else."""
    try:
        install(python, *lowest)
        wrong = what_fails(python)
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
        for lowest in [[floor] for floor in sorted(floors())] + [sorted(floors())]:
            install_pinned(python, wheel, BASE, ALL)
            fine &= try_out(python, *lowest)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
