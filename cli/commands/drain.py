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
from rsm.cli.output import say


@app.command()
def drain(
    ctx: typer.Context,
    engine_id: Annotated[str, typer.Argument(metavar="ENGINE", autocompletion=complete_engine)],
    stop: Annotated[bool, typer.Option("--stop", help="End the worker once its running calls are done.")] = False,
) -> None:
    """Takes an engine out of service. Waiting calls move to other engines; running calls finish."""
    settings = settings_of(ctx)
    with server_of(ctx) as server:
        engine_id = one_of(engine_id.strip("…"), Monitor(settings, server).engine_ids(), "engine")
        moved = order_drain(settings, server, engine_id, "stop" if stop else "drain")
        running = Monitor(settings, server).engine(engine_id)["running"]
    say(f"Engine {engine_id} takes no new calls: {moved} waiting ones went to others, {running} are running.")
    if stop:
        say(f"Its worker leaves when they are done, after {settings.drain_grace_s:g} s at the latest.")


def order_drain(settings: Settings, server: redis.Redis, engine_id: str, op: str) -> int:
    """Gives the order and moves the waiting calls; returns how many.

    Raises:
        EngineFailed: there is no live engine of this name.
    """
    transitions, total = Transitions(Keys(settings.namespace), settings), 0
    while True:
        moved = execute.run(server, transitions.drain(check_id(engine_id, "engine"), op))
        if moved < 0:
            at_hand = ", ".join(Monitor(settings, server).engine_ids()) or "none"
            raise EngineFailed(f"There is no live engine {engine_id}. Engines known: {at_hand}.")
        total += moved
        if moved < settings.batch:
            return total
