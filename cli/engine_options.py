"""Options that describe an engine, and the EngineConfig made of them."""

from __future__ import annotations

import importlib.util
import json
from typing import Annotated, Any

import typer

from rsm.broker import InvalidRequest

Model = Annotated[
    str,
    typer.Option(metavar="MODEL", help="Model name or path. Default: a tiny test model (vllm); any model (openai)."),
]


Backend = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="vllm, openai (a remote OpenAI-compatible server) or sim (a modelled engine). Default: openai with "
        "--base-url, else vllm if installed, else sim.",
    ),
]


BaseUrl = Annotated[str | None, typer.Option(metavar="URL", help="URL of the remote server, for --backend openai.")]


MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        show_default=False,
        help="Most calls that an engine runs at once. Default: 256; openai: what the server reports, if it does.",
    ),
]


Slots = Annotated[
    int, typer.Option("--max-num-seqs", min=1, metavar="N", help="Most calls that an engine runs at once.")
]


TensorParallel = Annotated[int, typer.Option("--tensor-parallel-size", min=1, metavar="N", help="GPUs per engine.")]


EngineArg = Annotated[
    list[str] | None,
    typer.Option("--engine-arg", metavar="NAME=VALUE", help="Further argument of the backend. May be repeated."),
]


Scheduler = Annotated[
    str | None,
    typer.Option("--engine-scheduler", metavar="NAME", help="fcfs, priority or plas. Default: RSM_ENGINE_SCHEDULER."),
]


EngineId = Annotated[str, typer.Option(metavar="ID", help="Id of the engine and its queue. Unique in the namespace.")]


Gpu = Annotated[int, typer.Option(min=0, metavar="N", help="First GPU of the engine.")]


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
    """The EngineConfig of these options. Raises ValidationError, which every command reports in one line."""
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
    """Splits NAME=VALUE. The value is JSON if it can be read as JSON, else text."""
    name, equals, value = option.partition("=")
    if not equals or not name:
        raise InvalidRequest(f"--engine-arg takes NAME=VALUE; got {option!r}.")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value
