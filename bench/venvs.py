"""Virtual environments for the benchmark's peers: their pins exclude one another, so each gets its own.

`python_for("rq")` returns the interpreter of `.bench/rq`. It makes that environment from
`bench/peers/requirements-rq.txt` on first use, and again whenever the file or the Python version changes.
As a script: `python bench/venvs.py [NAME ...]` prepares the named peers, or all.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
CACHE = HERE.parent / ".bench"
STAMP = "requirements.sha256"


def peer_names() -> list[str]:
    """Return the peers that have a requirements file."""
    return sorted(path.stem.removeprefix("requirements-") for path in PEERS.glob("requirements-*.txt"))


def python_for(name: str) -> Path:
    """Return the interpreter of the peer's environment, made or remade if need be."""
    requirements = PEERS / f"requirements-{name}.txt"
    home = CACHE / name
    key = cache_key(requirements)
    if stamp(home) != key:
        build(home, requirements)
        # Written last: an environment left half-made has no stamp and is made anew.
        (home / STAMP).write_text(key)
    return interpreter(home)


def version_of(package: str, name: str) -> str:
    """Return a package's version in the environment of that peer; "" = in this one."""
    if not name:
        return version(package)
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python_for(name), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def cache_key(requirements: Path) -> str:
    return hashlib.sha256(requirements.read_bytes() + platform.python_version().encode()).hexdigest()


def stamp(home: Path) -> str | None:
    path = home / STAMP
    return path.read_text() if path.exists() else None


def build(home: Path, requirements: Path) -> None:
    venv.EnvBuilder(clear=True, symlinks=os.name != "nt", with_pip=True).create(home)
    install = [str(interpreter(home)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # pip's words go to standard error: standard output belongs to the caller's results.
    subprocess.run([*install, "-r", str(requirements)], check=True, stdout=sys.stderr)


def interpreter(home: Path) -> Path:
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def main() -> None:
    names = sys.argv[1:] or peer_names()
    if unknown := set(names) - set(peer_names()):
        sys.exit(f"no such peer: {', '.join(sorted(unknown))}; known: {', '.join(peer_names())}")
    for name in names:
        print(f"{name}: {python_for(name)}")


if __name__ == "__main__":
    main()
