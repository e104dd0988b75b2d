"""`rsm drain`: takes an engine out of service."""

from __future__ import annotations

from typing import Annotated

import redis
import typer

from rsm.broker import EngineFailed, Settings
from rsm.broker.connection import execute
from rsm.broker.protocol.ids import check_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.views.lookup import one_of
from rsm.broker.views.monitor import Monitor
from rsm.cli.app import app, server_of, settings_of
from rsm.cli.completion import complete_engine
from rsm.cli.output import counted, say

EngineName = Annotated[str, typer.Argument(metavar="ENGINE", help="Id of the engine.", autocompletion=complete_engine)]


@app.command()
def drain(
    ctx: typer.Context,
    engine_id: EngineName,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the worker once its running calls have ended.")] = False,
) -> None:
    """Takes an engine out of service. Waiting calls move to other engines; running calls finish."""
    settings = settings_of(ctx)
    with server_of(ctx) as server:
        engine_id = whole_engine_id(settings, server, engine_id)
        moved = order_drain(settings, server, engine_id, "stop" if stop else "drain")
        running = Monitor(settings, server).engine(engine_id)["running"]
    say(
        f"Engine {engine_id} takes no new calls. {counted(moved, 'waiting call')} moved to other engines; "
        f"{counted(running, 'call')} still running."
    )
    if stop:
        say(f"Its worker stops when they have ended, after {settings.drain_grace_s:g} s at the latest.")


def whole_engine_id(settings: Settings, server: redis.Redis, part: str) -> str:
    """The id of the engine that a part of it names. Raises InvalidRequest if it names several."""
    return one_of(part.strip("…"), Monitor(settings, server).engine_ids(), "engine")


def order_drain(settings: Settings, server: redis.Redis, engine_id: str, op: str) -> int:
    """Orders a drain and moves the waiting calls. Returns how many were moved.

    Raises:
        EngineFailed: there is no live engine with this id.
    """
    transitions, total = Transitions(Keys(settings.namespace), settings), 0
    while True:
        moved = execute.run(server, transitions.drain(check_id(engine_id, "engine"), op))
        if moved < 0:
            known = ", ".join(Monitor(settings, server).engine_ids()) or "none"
            raise EngineFailed(f"There is no live engine {engine_id}. Known engines: {known}.")
        total += moved
        if moved < settings.batch:
            return total
