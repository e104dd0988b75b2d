"""`rsm dead`: dead letters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rsm.broker import EngineFailed, Settings
from rsm.broker.views.dead_letters import Replayed
from rsm.cli import tables
from rsm.cli.app import EXIT_FAILED, app, dead_letters_of, monitor_of, settings_of
from rsm.cli.commands.nodes import ordering
from rsm.cli.commands.views import Json
from rsm.cli.output import console, emit_json, say, say_error, table

dead = typer.Typer(help="Dead letters: calls that used up their attempts.", no_args_is_help=True)
app.add_typer(dead, name="dead")

Ref = Annotated[str, typer.Argument(metavar="ID", help="Of the entry, or of the call.")]


@dead.command("ls")
def ls(ctx: typer.Context, json: Json = False, limit: Annotated[int, typer.Option(min=1)] = 50) -> None:
    """The latest dead letters, newest first."""
    with dead_letters_of(ctx) as letters:
        found = [letter.summary() for letter in letters.ls(limit)]
    if json:
        emit_json(found)
        return
    with monitor_of(ctx) as monitor:
        console().print(tables.dead_table(found, monitor.now_ms()))


@dead.command("show")
def show(ctx: typer.Context, ref: Ref, json: Json = False) -> None:
    """One dead letter. Its body is a prompt and is not shown."""
    with dead_letters_of(ctx) as letters:
        found = letters.show(ref).summary()
    if json:
        emit_json(found)
    else:
        rows = [[name, str(value)] for name, value in found.items()]
        console().print(table(f"dead letter {found['entry']}", ["", ""], rows))


@dead.command("replay")
def replay(
    ctx: typer.Context,
    ref: Annotated[str | None, typer.Argument(metavar="[ID]", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that keep their body.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Here and at once, instead of as an RQ job on a node.")] = False,
    node: Annotated[str | None, typer.Option(help="The node that is to do it; none = any that listens.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for the node.")] = 30,
) -> None:
    """Sends a dead call again, and removes its letter once that is done."""
    if (ref is None) != everything:
        raise typer.BadParameter("name either a dead letter or --all")
    if now:
        with dead_letters_of(ctx) as letters:
            done = letters.replay_all()._asdict() if ref is None else {"id": letters.replay(ref)}
    else:
        done = _by_a_node(settings_of(ctx), node, ref or "", timeout)
    if ref is not None:
        say(f"Sent again as {done['id']}.")
    elif not _tell(Replayed(**done)):
        raise typer.Exit(EXIT_FAILED)


def _by_a_node(settings: Settings, node: str | None, ref: str, timeout_s: float) -> dict[str, Any]:
    from rsm.workers.supervision.node import listening

    nodes = [node] if node else listening(settings)
    if not nodes:
        raise EngineFailed(
            f"No node of namespace {settings.namespace} listens, so nobody would do it: start one by "
            "`rsm node --name NAME`, or add --now to replay from here."
        )
    with ordering(settings, nodes[0]) as client:
        return client.replay(ref, timeout_s)


def _tell(done: Replayed) -> bool:
    """False if one of those that keep their body could not be sent."""
    for failure in done.failures:
        say_error(failure)
    say(
        f"{done.sent} calls sent again." + (f" {done.bodiless} letters keep no body and stay." if done.bodiless else "")
    )
    return not done.failures
