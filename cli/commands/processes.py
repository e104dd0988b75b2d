"""`rsm up` and the parts one by one: router, worker, node; engines on nodes by start and stop."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from typing import Annotated, Any

import typer

from rsm.broker import EngineFailed, InvalidRequest, Settings, logs
from rsm.broker.protocol.models import EngineState
from rsm.cli.app import app, monitor_of, require_redis, server_of, settings_of
from rsm.cli.commands.drain import order_drain
from rsm.cli.output import say

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
_POLL_S = 0.1
_LEAVE_MARGIN_S = 20.0


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


@app.command()
def node(
    ctx: typer.Context, name: Annotated[str, typer.Option(help="Of this host; none = its host name.")] = ""
) -> None:
    """Serves this host's RQ queue, so that `rsm start --node` can bring up engines here."""
    import socket

    from rsm.workers.supervision.node import run_node

    logs.configure(settings_of(ctx), "node")
    require_redis(settings_of(ctx))
    run_node(name or socket.gethostname(), settings_of(ctx))


@app.command()
def start(
    ctx: typer.Context,
    engine_id: EngineId,
    node: Annotated[str, typer.Option(help="The host; `rsm node` must run there.")],
    model: Model = "",
    gpu: Gpu = 0,
    backend: Backend = None,
    max_num_seqs: MaxNumSeqs = 256,
    tensor_parallel: TensorParallel = 1,
    base_url: BaseUrl = None,
    engine_arg: EngineArg = None,
    engine_scheduler: Scheduler = None,
    timeout: Annotated[float, typer.Option(help="Seconds it may take to come up.")] = 900.0,
) -> None:
    """Starts an engine on another host and waits until it is READY."""
    from rsm.workers.supervision.node import NodeClient

    config = engine_config(
        engine_id, model, gpu, backend, max_num_seqs, tensor_parallel, base_url, engine_arg, engine_scheduler
    )
    require_redis(settings_of(ctx))
    status = NodeClient(node, settings_of(ctx)).start_engine(config, timeout)
    say(f"Engine {engine_id} is {status['state']} on {node}: {status['model']}.")


@app.command()
def stop(
    ctx: typer.Context,
    engine_id: Annotated[str, typer.Argument(metavar="ENGINE")],
    node: Annotated[str | None, typer.Option(help="The host it was started on with `rsm start`.")] = None,
) -> None:
    """Stops an engine: its waiting calls go to others, its running ones may finish within the grace."""
    if node is not None:
        from rsm.workers.supervision.node import NodeClient

        require_redis(settings_of(ctx))
        NodeClient(node, settings_of(ctx)).stop_engine(engine_id)
    else:
        with server_of(ctx) as server:
            order_drain(settings_of(ctx), server, engine_id, "stop")
        _await_stopped(ctx, settings_of(ctx), engine_id)
    say(f"Engine {engine_id} has stopped.")


def _await_stopped(ctx: typer.Context, settings: Settings, engine_id: str) -> None:
    until = time.monotonic() + settings.drain_grace_s + _LEAVE_MARGIN_S
    with monitor_of(ctx) as monitor:
        while (state := monitor.engine(engine_id)["state"]) not in (EngineState.STOPPED, EngineState.DEAD):
            if time.monotonic() > until:
                raise EngineFailed(f"Engine {engine_id} is still {state}; look at its log.")
            time.sleep(_POLL_S)
