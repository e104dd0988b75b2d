"""`rsm ps`, `engines`, `sessions`, `call` and `stats`: the current state."""

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
from rsm.broker.errors import BrokerUnavailable
from rsm.broker.protocol.models import EngineState
from rsm.broker.views.monitor import Monitor
from rsm.cli import tables
from rsm.cli.app import app, lookup_of, monitor_of
from rsm.cli.completion import complete_call, complete_engine
from rsm.cli.options import Form, Json, Output, Watch, form_of
from rsm.cli.output import console_for, emit_json, on_terminal, record_json, room_for, show

_REFRESH_S = 1.0

# Returns the value for JSON, and a table that fits the given width; None: a wide one.
View = Callable[[Monitor, int | None], tuple[Any, RenderableType]]


@app.command()
def ps(
    ctx: typer.Context,
    json: Json = False,
    output: Output = None,
    watch: Watch = False,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Most calls to show.")] = 200,
) -> None:
    """Lists unfinished calls: running ones first, then waiting ones in queue order."""

    def view(monitor: Monitor, room: int | None) -> tuple[Any, RenderableType]:
        calls = monitor.active_calls(limit)
        shown = tables.calls_table(calls, monitor.backlog(), monitor.now_ms(), monitor.usage(), room=room, limit=limit)
        return tables.calls_json(calls), shown

    _show(ctx, view, form_of(output, json), watch)


@app.command()
def engines(
    ctx: typer.Context,
    json: Json = False,
    output: Output = None,
    watch: Watch = False,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Include engines that stopped or died without an error.")
    ] = False,
    ready: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE",
            help="For health checks: exit status 1 unless this engine is READY.",
            autocompletion=complete_engine,
        ),
    ] = None,
) -> None:
    """Lists engines with their state, load, KV cache, last heartbeat and error."""

    def view(monitor: Monitor, room: int | None) -> tuple[Any, RenderableType]:
        found = monitor.engines()
        return found, tables.engines_table(found, monitor.now_ms(), room=room, everything=everything)

    _show(ctx, view, form_of(output, json), watch)
    if ready is not None:
        with monitor_of(ctx) as monitor:
            _require_ready(monitor, ready)


def _require_ready(monitor: Monitor, engine_id: str) -> None:
    state = monitor.engine(engine_id)["state"]
    if state != EngineState.READY:
        raise EngineFailed(f"Engine {engine_id} is {state}, not READY.")


@app.command()
def sessions(ctx: typer.Context, json: Json = False, output: Output = None, watch: Watch = False) -> None:
    """Lists programs and their sessions: those with unfinished calls first, then by last activity."""

    def view(monitor: Monitor, room: int | None) -> tuple[Any, RenderableType]:
        found = tables.running_first(monitor.sessions())
        return found, tables.sessions_table(found, monitor.now_ms(), monitor.service_unit(), room=room)

    _show(ctx, view, form_of(output, json), watch)


@app.command()
def call(
    ctx: typer.Context,
    call_id: Annotated[str, typer.Argument(metavar="ID", autocompletion=complete_call)],
    json: Json = False,
    output: Output = None,
) -> None:
    """Shows one call: its engine and why, its times, attempts, error and result."""
    with lookup_of(ctx) as lookup:
        whole = lookup.call(call_id)

    def view(monitor: Monitor, _: int | None) -> tuple[Any, RenderableType]:
        record = monitor.call(whole)
        return record_json(record), tables.call_table(record, monitor.now_ms())

    _show(ctx, view, form_of(output, json))


@app.command()
def stats(ctx: typer.Context, json: Json = False, output: Output = None) -> None:
    """Shows totals since the namespace began, and what is waiting and running now."""

    def view(monitor: Monitor, _: int | None) -> tuple[Any, RenderableType]:
        found = monitor.stats()
        return found, tables.stats_table(found)

    _show(ctx, view, form_of(output, json))


def _show(ctx: typer.Context, view: View, form: Form, watch: bool = False) -> None:
    if form == "json" and watch:
        raise typer.BadParameter("--json and --watch exclude each other; leave one out")
    with monitor_of(ctx) as monitor:
        if watch:
            _watch(monitor, view, form)
            return
        value, renderable = view(monitor, room_for(form))
    if form == "json":
        emit_json(value)
    else:
        show(renderable, form=form)


def _watch(monitor: Monitor, view: View, form: Form) -> None:
    """Refreshes a view until Ctrl-C. If Redis does not answer, says so and keeps trying."""
    try:
        if on_terminal():
            _watch_in_place(monitor, view, form)
        else:
            _watch_line_by_line(monitor, view, form)
    except KeyboardInterrupt:
        return


def _watch_in_place(monitor: Monitor, view: View, form: Form) -> None:
    with Live(console=console_for(form), auto_refresh=False, screen=False) as live:
        while True:
            live.update(_render(monitor, view, form), refresh=True)
            time.sleep(_REFRESH_S)


def _watch_line_by_line(monitor: Monitor, view: View, form: Form) -> None:
    """Prints one view after the other, for a file or a pipe."""
    while True:
        show(_render(monitor, view, form), form=form)
        time.sleep(_REFRESH_S)


def _render(monitor: Monitor, view: View, form: Form) -> RenderableType:
    try:
        return view(monitor, room_for(form))[1]
    except (redis.RedisError, BrokerUnavailable) as e:
        return Text(f"Redis does not answer ({type(e).__name__}). Trying again.", style="bold red")
