"""Assigns this machine's GPUs to the engines of a fleet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rsm.broker.errors import InvalidRequest
from rsm.workers.backends.vllm.start.gpus import on_gpu, visible_gpus

# The share of a GPU's memory for all engines on it together: vLLM's default for one engine.
_SHARED = 0.9


@dataclass(frozen=True, slots=True)
class Place:
    """The first GPU of an engine, and the vLLM arguments that sharing needs."""

    gpu_id: int
    engine_args: dict[str, Any] = field(default_factory=dict)


def places(engines: int, tensor_parallel_size: int = 1, *, share: bool = False) -> list[Place]:
    """A place for each engine: GPUs of its own, or with `share` a part of them. Without a GPU vLLM runs on the CPU.

    Raises:
        InvalidRequest: there are too few GPUs.
    """
    gpus = len(visible_gpus()) if on_gpu() else 0
    if not gpus or engines * tensor_parallel_size <= gpus:
        return [Place(i * tensor_parallel_size) for i in range(engines)]
    groups = gpus // tensor_parallel_size
    if not (share and groups):
        raise InvalidRequest(_too_few(engines, tensor_parallel_size, gpus, groups))
    most = -(-engines // groups)
    part = {"gpu_memory_utilization": round(_SHARED / most, 3)}
    return [Place(i % groups * tensor_parallel_size, part if most > 1 else {}) for i in range(engines)]


def _too_few(engines: int, tensor_parallel_size: int, gpus: int, groups: int) -> str:
    wanted = engines * tensor_parallel_size
    each = f" of {tensor_parallel_size} GPUs each" if tensor_parallel_size > 1 else ""
    advice = (
        f"Start {groups} (--engines {groups}), or let them share GPUs and their memory (--share-gpus)."
        if groups
        else f"An engine can have at most {gpus} (--tensor-parallel-size)."
    )
    return f"{engines} engines{each} need {wanted} GPUs, and this machine has {gpus}. {advice}"
