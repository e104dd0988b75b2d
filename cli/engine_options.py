"""Options that describe an engine, and the EngineConfig that they make."""

from __future__ import annotations

import importlib.util
import json
from typing import Annotated, Any

import typer

from rsm.broker import InvalidRequest

Model = Annotated[str, typer.Option(help="Name or folder; none = for vllm a tiny random one, for openai any.")]


Backend = Annotated[
    str | None, typer.Option(help="vllm, openai (a remote OpenAI-compatible server) or sim; none = vllm if installed.")
]


BaseUrl = Annotated[str | None, typer.Option(help="Of the remote server, for --backend openai.")]


MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        min=1, show_default=False, help="Calls an engine runs at once. Default: 256; openai: as the server says."
    ),
]


TensorParallel = Annotated[int, typer.Option("--tensor-parallel-size", min=1, help="GPUs of one engine.")]


EngineArg = Annotated[
    list[str] | None, typer.Option("--engine-arg", metavar="NAME=VALUE", help="Any further argument of the backend.")
]


Scheduler = Annotated[
    str | None,
    typer.Option("--engine-scheduler", help="fcfs, priority or plas; none = as RSM_ENGINE_SCHEDULER says."),
]


EngineId = Annotated[str, typer.Option(help="Names its queue; unique in the namespace.")]


Gpu = Annotated[int, typer.Option(min=0, help="The first of its GPUs.")]


def default_backend() -> str:
    return "vllm" if importlib.util.find_spec("vllm") else "sim"


def engine_config(
    engine_id: str,
    model: str,
    gpu: int,
    backend: str | None,
    max_num_seqs: int | None,
    tensor_parallel: int,
    base_url: str | None,
    engine_arg: list[str] | None,
    scheduler: str | None = None,
) -> Any:
    """The EngineConfig of these options. A wrong one is a pydantic error, which the command reports in a sentence."""
    from rsm.workers.config import EngineConfig

    named = {"max_num_seqs": max_num_seqs, "base_url": base_url, "engine_scheduler": scheduler}
    return EngineConfig(
        engine_id=engine_id,
        model=model,
        gpu_id=gpu,
        backend=backend or ("openai" if base_url else default_backend()),
        tensor_parallel_size=tensor_parallel,
        engine_args=dict(map(pair, engine_arg or [])),
        **{name: value for name, value in named.items() if value is not None},
    )


def pair(option: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is JSON where it reads as such, else text."""
    name, equals, value = option.partition("=")
    if not equals or not name:
        raise InvalidRequest(f"--engine-arg takes NAME=VALUE; got {option!r}.")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value
