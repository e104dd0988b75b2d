"""`rsm ps`, `engines`, `sessions`, `call`, `stats`: what is going on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import redis
import typer
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from rsm.broker import EngineFailed
from rsm.broker.protocol.models import EngineState
from rsm.broker.views.monitor import Monitor
from rsm.cli import tables
from rsm.cli.app import app, monitor_of
from rsm.cli.output import console, emit_json, record_json

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Refresh every second, until Ctrl-C.")]
_REFRESH_S = 1.0

View = Callable[[Monitor], tuple[Any, RenderableType]]


@app.command()
def ps(
    ctx: typer.Context,
    json: Json = False,
    watch: Watch = False,
    limit: Annotated[int, typer.Option(min=1, help="Most calls to show.")] = 200,
) -> None:
    """Calls that wait or run, engine by engine in the order of their queues."""

    def view(monitor: Monitor) -> tuple[Any, RenderableType]:
        calls = monitor.active_calls(limit)
        return tables.calls_json(calls), tables.calls_table(calls, monitor.backlog(), monitor.now_ms(), monitor.usage())

    _show(ctx, view, json, watch)


@app.command()
def engines(
    ctx: typer.Context,
    json: Json = False,
    watch: Watch = False,
    ready: Annotated[
        str | None, typer.Option(metavar="ENGINE", help="For health checks: status 1 unless this engine is READY.")
    ] = None,
) -> None:
    """Engines: state, load, KV cache, heartbeat."""

    def view(monitor: Monitor) -> tuple[Any, RenderableType]:
        found = monitor.engines()
        return found, tables.engines_table(found, monitor.now_ms())

    _show(ctx, view, json, watch)
    if ready is not None:
        with monitor_of(ctx) as monitor:
            _require_ready(monitor, ready)


def _require_ready(monitor: Monitor, engine_id: str) -> None:
    state = monitor.engine(engine_id)["state"]
    if state != EngineState.READY:
        raise EngineFailed(f"Engine {engine_id} is {state}, not READY.")


@app.command()
def sessions(ctx: typer.Context, json: Json = False) -> None:
    """The process table: programs, what they have used, where their KV cache is."""

    def view(monitor: Monitor) -> tuple[Any, RenderableType]:
        found = monitor.sessions()
        return found, tables.sessions_table(found, monitor.now_ms(), monitor.service_unit())

    _show(ctx, view, json)


@app.command()
def call(ctx: typer.Context, call_id: Annotated[str, typer.Argument(metavar="ID")], json: Json = False) -> None:
    """One call: why it went to its engine, when what happened, attempts, error, result."""

    def view(monitor: Monitor) -> tuple[Any, RenderableType]:
        record = monitor.call(call_id)
        return record_json(record), tables.call_table(record, monitor.now_ms())

    _show(ctx, view, json)


@app.command()
def stats(ctx: typer.Context, json: Json = False) -> None:
    """Totals since the namespace began, and what waits and runs now."""

    def view(monitor: Monitor) -> tuple[Any, RenderableType]:
        found = monitor.stats()
        return found, tables.stats_table(found)

    _show(ctx, view, json)


def _show(ctx: typer.Context, view: View, json: bool, watch: bool = False) -> None:
    if json and watch:
        raise typer.BadParameter("--json and --watch do not go together")
    with monitor_of(ctx) as monitor:
        if watch:
            _watch(monitor, view)
            return
        value, renderable = view(monitor)
    if json:
        emit_json(value)
    else:
        console().print(renderable)


def _watch(monitor: Monitor, view: View) -> None:
    """Shows a view again and again. A Redis that is away for a while is said so, and waited for."""
    with Live(console=console(), auto_refresh=False, screen=False) as live:
        try:
            while True:
                live.update(_render(monitor, view), refresh=True)
                time.sleep(_REFRESH_S)
        except KeyboardInterrupt:
            return


def _render(monitor: Monitor, view: View) -> RenderableType:
    try:
        return view(monitor)[1]
    except redis.RedisError as e:
        return Text(f"Redis does not answer ({type(e).__name__}); trying again.", style="bold red")
