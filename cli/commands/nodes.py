"""`rsm node`, and `rsm start` and `rsm stop` for engines on nodes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsm.broker import EngineFailed, Settings, logs
from rsm.broker.protocol.models import EngineState
from rsm.cli.app import app, monitor_of, require_redis, server_of, settings_of
from rsm.cli.commands.drain import EngineName, order_drain, whole_engine_id
from rsm.cli.completion import complete_node
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
from rsm.cli.output import say, say_error

if TYPE_CHECKING:
    from rsm.workers.supervision.node import NodeClient

_POLL_S = 0.1
_STOP_MARGIN_S = 20.0
# Signals that end a command from outside. SIGHUP comes when its terminal closes.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def ordering(settings: Settings, node: str) -> Iterator[NodeClient]:
    """A client for orders to a node. SIGTERM and SIGHUP withdraw the order, too."""
    from rsm.workers.supervision.node import NodeClient

    require_redis(settings)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _exit)
    try:
        yield NodeClient(node, settings)
    except (KeyboardInterrupt, SystemExit):
        say_error(f"The order to node {node} is withdrawn.")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, _: Any) -> None:
    """Raises, so that the wait is cleaned up. The status is that of a process that a signal ended."""
    raise SystemExit(128 + number)


@app.command()
def node(
    ctx: typer.Context,
    name: Annotated[str, typer.Option(metavar="NODE", help="Name of this node. Default: the host's name.")] = "",
) -> None:
    """Serves this host's RQ queue, so that `rsm start --node` can start engines here."""
    import socket

    from rsm.workers.supervision.node import run_node

    logs.configure(settings_of(ctx), "node")
    require_redis(settings_of(ctx))
    run_node(name or socket.gethostname(), settings_of(ctx))


@app.command()
def start(
    ctx: typer.Context,
    engine_id: EngineId,
    node: Annotated[
        str,
        typer.Option(
            metavar="NODE", help="Node to start it on; `rsm node` must run there.", autocompletion=complete_node
        ),
    ],
    model: Model = "",
    gpu: Gpu = 0,
    backend: Backend = None,
    max_num_seqs: MaxNumSeqs = None,
    tensor_parallel: TensorParallel = 1,
    base_url: BaseUrl = None,
    engine_arg: EngineArg = None,
    engine_scheduler: Scheduler = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long the start may take.")] = 900.0,
) -> None:
    """Starts an engine on a node and waits until it is READY. Ctrl-C withdraws the order and undoes the start."""
    config = engine_config(
        engine_id, model, gpu, backend, max_num_seqs, tensor_parallel, base_url, engine_arg, engine_scheduler
    )
    with ordering(settings_of(ctx), node) as client:
        status = client.start_engine(config, timeout)
    say(f"Engine {engine_id} is {status['state']} on {node}: {status['model']}.")


@app.command()
def stop(
    ctx: typer.Context,
    engine_id: EngineName,
    node: Annotated[
        str | None,
        typer.Option(
            metavar="NODE",
            help="Node that started the engine; it also kills one that hangs. Default: only ask the worker to stop.",
            autocompletion=complete_node,
        ),
    ] = None,
) -> None:
    """Stops an engine. Waiting calls move to other engines; running calls may finish within RSM_DRAIN_GRACE_S."""
    settings = settings_of(ctx)
    if node is not None:
        with ordering(settings, node) as client, server_of(ctx) as server:
            engine_id = whole_engine_id(settings, server, engine_id)
            client.stop_engine(engine_id)
    else:
        with server_of(ctx) as server:
            engine_id = whole_engine_id(settings, server, engine_id)
            order_drain(settings, server, engine_id, "stop")
        _await_stopped(ctx, settings, engine_id)
    say(f"Engine {engine_id} has stopped.")


def _await_stopped(ctx: typer.Context, settings: Settings, engine_id: str) -> None:
    until = time.monotonic() + settings.drain_grace_s + _STOP_MARGIN_S
    with monitor_of(ctx) as monitor:
        while (state := monitor.engine(engine_id)["state"]) not in (EngineState.STOPPED, EngineState.DEAD):
            if time.monotonic() > until:
                raise EngineFailed(f"Engine {engine_id} is still {state}. Check its log.")
            time.sleep(_POLL_S)
