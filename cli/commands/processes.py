"""`rsm router` and `rsm worker`: single processes."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from rsm.broker import logs
from rsm.cli.app import app, settings_of
from rsm.cli.engine_options import (
    Backend,
    BaseUrl,
    EngineArg,
    EngineId,
    Gpu,
    MaxNumSeqs,
    Model,
    Scheduler,
    TensorParallel,
    engine_config,
)


@app.command()
def router(ctx: typer.Context) -> None:
    """Runs a router in the foreground. Any number of routers may run."""
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
    max_num_seqs: MaxNumSeqs = None,
    tensor_parallel: TensorParallel = 1,
    base_url: BaseUrl = None,
    engine_arg: EngineArg = None,
    engine_scheduler: Scheduler = None,
    supervised: Annotated[bool, typer.Option("--supervised", help="Restart the worker when it dies.")] = False,
) -> None:
    """Runs an engine and its worker in the foreground. SIGTERM drains it."""
    from rsm.workers.__main__ import run_supervised, run_worker
    from rsm.workers.environment import NODE_VARIABLE

    logs.configure(settings_of(ctx), engine_id)
    config = engine_config(
        engine_id, model, gpu, backend, max_num_seqs, tensor_parallel, base_url, engine_arg, engine_scheduler
    )
    run = run_supervised if supervised else run_worker
    raise typer.Exit(run(config, settings_of(ctx), os.environ.get(NODE_VARIABLE, "")))
