"""Virtual environments for the benchmark's peers. Their pinned versions conflict, so each peer has its own.

`python_for("rq")` returns the interpreter of `.bench/rq`. It builds that environment from
`bench/peers/requirements-rq.txt` on first use, and again whenever the file or the Python version changes.
As a script, `python bench/venvs.py [NAME ...]` prepares the named peers. Default: all peers.
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
    """Returns the peers that have a requirements file."""
    return sorted(path.stem.removeprefix("requirements-") for path in PEERS.glob("requirements-*.txt"))


def python_for(name: str) -> Path:
    """Returns the interpreter of the peer's environment, and builds the environment if needed."""
    requirements = PEERS / f"requirements-{name}.txt"
    folder = CACHE / name
    key = cache_key(requirements)
    if stamp(folder) != key:
        build(folder, requirements)
        # Written last, so that an incomplete environment has no stamp and is rebuilt.
        (folder / STAMP).write_text(key)
    return interpreter(folder)


def version_of(package: str, name: str) -> str:
    """Returns a package's version in the environment of a peer; a `name` of "" stands for this environment."""
    if not name:
        return version(package)
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python_for(name), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def cache_key(requirements: Path) -> str:
    return hashlib.sha256(requirements.read_bytes() + platform.python_version().encode()).hexdigest()


def stamp(folder: Path) -> str | None:
    path = folder / STAMP
    return path.read_text() if path.exists() else None


def build(folder: Path, requirements: Path) -> None:
    venv.EnvBuilder(clear=True, symlinks=os.name != "nt", with_pip=True).create(folder)
    install = [str(interpreter(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # pip's output goes to standard error, because standard output carries the caller's results.
    subprocess.run([*install, "-r", str(requirements)], check=True, stdout=sys.stderr)


def interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def main() -> None:
    names = sys.argv[1:] or peer_names()
    if unknown := set(names) - set(peer_names()):
        sys.exit(f"unknown peer: {', '.join(sorted(unknown))}; choose from: {', '.join(peer_names())}")
    for name in names:
        print(f"{name}: {python_for(name)}")


if __name__ == "__main__":
    main()
