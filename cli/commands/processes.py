"""`rsm up`, and the processes one by one: router, worker."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Annotated, Any

import typer

from rsm.broker import InvalidRequest, logs
from rsm.cli.app import app, settings_of

Model = Annotated[str, typer.Option(help="Name or folder; none = for vllm a tiny random one, for openai any.")]
Backend = Annotated[
    str | None, typer.Option(help="vllm, openai (a remote OpenAI-compatible server) or sim; none = vllm if installed.")
]
BaseUrl = Annotated[str | None, typer.Option(help="Of the remote server, for --backend openai.")]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="Calls an engine runs at once.")]
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
    max_num_seqs: int,
    tensor_parallel: int,
    base_url: str | None,
    engine_arg: list[str] | None,
    scheduler: str | None = None,
) -> Any:
    """The EngineConfig of these options. A wrong one is a pydantic error, which the command tells in a sentence."""
    from rsm.workers.config import EngineConfig

    return EngineConfig(
        engine_id=engine_id,
        model=model,
        gpu_id=gpu,
        backend=backend or default_backend(),
        max_num_seqs=max_num_seqs,
        tensor_parallel_size=tensor_parallel,
        base_url=base_url,
        engine_args=dict(map(pair, engine_arg or [])),
        engine_scheduler=scheduler,
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


@app.command()
def up(
    ctx: typer.Context,
    engines: Annotated[int, typer.Option(min=0, help="How many, as e0, e1, … on GPUs of their own.")] = 1,
    model: Model = "",
    backend: Backend = None,
    base_url: BaseUrl = None,
    routers: Annotated[int, typer.Option(min=1)] = 1,
    max_num_seqs: MaxNumSeqs = 256,
    tensor_parallel: TensorParallel = 1,
    engine_arg: EngineArg = None,
    engine_scheduler: Scheduler = None,
) -> None:
    """Everything on this machine, in the foreground: Redis (unless --redis URL or RSM_REDIS_URL), routers, engines.

    Ctrl-C lets running calls finish and gives the others back; a second one stops at once. Calls that are not finished
    stay in Redis and go on when engines are back.
    """
    from rsm.cli.up import run_up

    configs = [
        engine_config(
            f"e{i}",
            model,
            i * tensor_parallel,
            backend,
            max_num_seqs,
            tensor_parallel,
            base_url,
            engine_arg,
            engine_scheduler,
        )
        for i in range(engines)
    ]
    run_up(settings_of(ctx), configs, routers)


@app.command()
def router(ctx: typer.Context) -> None:
    """One router, in the foreground. Any number may run."""
    from rsm.router.__main__ import run_router

    logs.configure(settings_of(ctx), "router")
    raise typer.Exit(run_router(settings_of(ctx)))


@app.command()
def worker(
    ctx: typer.Context,
    engine_id: EngineId,
    model: Model = "",
    gpu: Gpu = 0,
    backend: Backend = None,
    max_num_seqs: MaxNumSeqs = 256,
    tensor_parallel: TensorParallel = 1,
    base_url: BaseUrl = None,
    engine_arg: EngineArg = None,
    engine_scheduler: Scheduler = None,
    supervised: Annotated[bool, typer.Option("--supervised", help="Start it again when it dies.")] = False,
) -> None:
    """One engine, in the foreground. SIGTERM drains it."""
    from rsm.workers.__main__ import run_supervised, run_worker
    from rsm.workers.environment import NODE_VARIABLE

    logs.configure(settings_of(ctx), engine_id)
    config = engine_config(
        engine_id, model, gpu, backend, max_num_seqs, tensor_parallel, base_url, engine_arg, engine_scheduler
    )
    run = run_supervised if supervised else run_worker
    raise typer.Exit(run(config, settings_of(ctx), os.environ.get(NODE_VARIABLE, "")))
