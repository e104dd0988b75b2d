"""`rsm doctor`: what is wrong, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict

import typer

from rsm.broker.connection.topology import shown_url
from rsm.cli import tables
from rsm.cli.app import EXIT_FAILED, app, settings_of
from rsm.cli.options import Json, Output, form_of
from rsm.cli.output import emit_json, say, show


@app.command()
def doctor(ctx: typer.Context, json: Json = False, output: Output = None) -> None:
    """Checks Redis, routers, engines and queues, and gives advice. Exits with status 1 if there is a problem."""
    from rsm.cli.checks import examine

    form = form_of(output, json)
    settings = settings_of(ctx)
    checks = [asdict(check) for check in examine(settings)]
    if form == "json":
        where = {"redis": shown_url(settings.url()), "namespace": settings.namespace}
        emit_json({**where, "healthy": not _problems(checks), "checks": checks})
    else:
        say(f"Redis {shown_url(settings.url())}, namespace {settings.namespace}")
        show(tables.checks_table(checks), form=form)
    if _problems(checks):
        raise typer.Exit(EXIT_FAILED)


def _problems(checks: list[dict[str, str]]) -> bool:
    return any(check["status"] == "problem" for check in checks)
