"""`rsm dead`: dead letters."""

from __future__ import annotations

from typing import Annotated

import typer

from broker import RsmError
from broker.dead_letters import DeadLetters
from engine.cli import tables
from engine.cli.app import EXIT_FAILED, app, dead_letters_of, monitor_of
from engine.cli.output import console, emit_json, say, say_error, table
from engine.cli.show import Json

dead = typer.Typer(help="Dead letters: calls that used up their attempts.", no_args_is_help=True)
app.add_typer(dead, name="dead")

Ref = Annotated[str, typer.Argument(metavar="ID", help="Of the entry, or of the call.")]
_ALL = 1_000_000


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
) -> None:
    """Sends a dead call again, and removes its letter once that is done."""
    if (ref is None) != everything:
        raise typer.BadParameter("name either a dead letter or --all")
    with dead_letters_of(ctx) as letters:
        if ref is not None:
            say(f"Sent again as {letters.replay(ref)}.")
        elif not _replay_all(letters):
            raise typer.Exit(EXIT_FAILED)


def _replay_all(letters: DeadLetters) -> bool:
    """Oldest first, as they came. False if one of those that keep their body could not be sent."""
    found = letters.ls(_ALL)
    kept = [letter for letter in reversed(found) if letter.replayable]
    sent = 0
    for letter in kept:
        try:
            letters.replay(letter.entry)
            sent += 1
        except RsmError as e:
            say_error(str(e))
    skipped = len(found) - len(kept)
    say(f"{sent} calls sent again." + (f" {skipped} letters keep no body and stay." if skipped else ""))
    return sent == len(kept)
