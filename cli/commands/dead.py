"""`rsm dead`: dead letters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rsm.broker import EngineFailed, Settings, UnknownCall
from rsm.broker.protocol.ids import is_id
from rsm.broker.views.dead_letters import DeadLetter, DeadLetters, Replayed
from rsm.broker.views.lookup import one_of
from rsm.cli import tables
from rsm.cli.app import EXIT_FAILED, app, dead_letters_of, monitor_of, settings_of
from rsm.cli.commands.nodes import ordering
from rsm.cli.completion import complete_dead_letter
from rsm.cli.options import Json, Output, form_of
from rsm.cli.output import emit_json, room_for, say, say_error, table
from rsm.cli.output import show as show_table

dead = typer.Typer(help="Lists and replays dead letters: calls that used up their attempts.", no_args_is_help=True)
app.add_typer(dead, name="dead")

Ref = Annotated[
    str,
    typer.Argument(metavar="ID", help="Of the letter's entry, or of its call.", autocompletion=complete_dead_letter),
]
# Letters among whose ids a part of an id is looked for; each comes with its body.
_LOOKED_AT = 1000


@dead.command("ls")
def ls(
    ctx: typer.Context,
    json: Json = False,
    output: Output = None,
    limit: Annotated[int, typer.Option(min=1, help="Most letters to show.")] = 50,
) -> None:
    """Lists dead letters, newest first."""
    form = form_of(output, json)
    with dead_letters_of(ctx) as letters:
        found = [letter.summary() for letter in letters.ls(limit)]
    if form == "json":
        emit_json(found)
        return
    with monitor_of(ctx) as monitor:
        printed = tables.dead_table(found, monitor.now_ms(), room=room_for(form))
    show_table(printed, form=form)


@dead.command("show")
def show(
    ctx: typer.Context,
    ref: Ref,
    json: Json = False,
    output: Output = None,
) -> None:
    """Shows one dead letter. Its body is a prompt and is not shown."""
    form = form_of(output, json)
    with dead_letters_of(ctx) as letters:
        found = _letter(letters, ref).summary()
    if form == "json":
        emit_json(found)
    else:
        rows = [[name, str(value)] for name, value in found.items()]
        show_table(table(f"dead letter {found['entry']}", ["", ""], rows), form=form)


def _letter(letters: DeadLetters, ref: str) -> DeadLetter:
    """By the id of its entry or of its call, or by a part of the latter."""
    try:
        return letters.show(ref)
    except UnknownCall:
        whole = _whole(letters, ref)
        if whole == ref:
            raise
    return letters.show(whole)


def _whole(letters: DeadLetters, ref: str) -> str:
    part = ref.strip("…")
    return one_of(part, [letter.request_id for letter in letters.ls(_LOOKED_AT)], "call") if is_id(part) else ref


@dead.command("replay")
def replay(
    ctx: typer.Context,
    ref: Annotated[
        str | None, typer.Argument(metavar="ID", show_default=False, autocompletion=complete_dead_letter)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All letters that keep their body.")] = False,
    now: Annotated[bool, typer.Option("--now", help="In this process and at once, not as a job on a node.")] = False,
    node: Annotated[
        str | None, typer.Option(metavar="NODE", help="The node that does it. Default: any that listens.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="How long to wait for the node.")] = 30,
) -> None:
    """Submits a dead call again, then removes its letter."""
    if (ref is None) != everything:
        raise typer.BadParameter("name either a dead letter or --all")
    if now:
        with dead_letters_of(ctx) as letters:
            done = _replay_here(letters, ref)
    else:
        from rsm.workers.supervision.node import listening  # first, for it says what is not installed

        with dead_letters_of(ctx) as letters:
            named = "" if ref is None else _whole(letters, ref)
        done = _by_a_node(settings_of(ctx), [node] if node else listening(settings_of(ctx)), named, timeout)
    if ref is not None:
        say(f"Sent again as {done['id']}.")
    elif not _tell(Replayed(**done)):
        raise typer.Exit(EXIT_FAILED)


def _replay_here(letters: DeadLetters, ref: str | None) -> dict[str, Any]:
    if ref is None:
        return letters.replay_all()._asdict()
    return {"id": letters.replay(_letter(letters, ref).entry)}


def _by_a_node(settings: Settings, nodes: list[str], ref: str, timeout_s: float) -> dict[str, Any]:
    """The first of these nodes does it."""
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
