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
from rsm.cli.completion import complete_dead_letter, complete_node
from rsm.cli.options import Json, Output, form_of
from rsm.cli.output import counted, emit_json, room_for, say, say_error
from rsm.cli.output import show as show_table

dead = typer.Typer(help="Lists and replays dead letters: calls that used up their attempts.", no_args_is_help=True)
app.add_typer(dead, name="dead")

_REF_HELP = "Id of the letter's entry or of its call."
Ref = Annotated[str, typer.Argument(metavar="ID", help=_REF_HELP, autocompletion=complete_dead_letter)]
# How many letters are searched for a part of an id. Each is read with its body.
_SEARCHED = 1000


@dead.command("ls")
def ls(
    ctx: typer.Context,
    json: Json = False,
    output: Output = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Most letters to show.")] = 50,
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
    """Shows one dead letter, without its body: that is a prompt."""
    form = form_of(output, json)
    with dead_letters_of(ctx) as letters:
        found = _letter(letters, ref).summary()
    if form == "json":
        emit_json(found)
        return
    with monitor_of(ctx) as monitor:
        printed = tables.letter_table(found, monitor.now_ms())
    show_table(printed, form=form)


def _letter(letters: DeadLetters, ref: str) -> DeadLetter:
    """Finds a letter by the id of its entry or of its call, or by a part of the call's id."""
    try:
        return letters.show(ref)
    except UnknownCall:
        whole = _whole(letters, ref)
        if whole == ref:
            raise
    return letters.show(whole)


def _whole(letters: DeadLetters, ref: str) -> str:
    part = ref.strip("…")
    return one_of(part, [letter.request_id for letter in letters.ls(_SEARCHED)], "call") if is_id(part) else ref


@dead.command("replay")
def replay(
    ctx: typer.Context,
    ref: Annotated[
        str | None,
        typer.Argument(metavar="ID", show_default=False, help=_REF_HELP, autocompletion=complete_dead_letter),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Replay all letters that keep their body.")] = False,
    now: Annotated[
        bool, typer.Option("--now", help="Replay in this process and at once, not as a job on a node.")
    ] = False,
    node: Annotated[
        str | None,
        typer.Option(
            metavar="NODE", help="Node that replays. Default: any that listens.", autocompletion=complete_node
        ),
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
        from rsm.workers.supervision.node import listening  # first: without RQ, this says what to install

        with dead_letters_of(ctx) as letters:
            named = "" if ref is None else _whole(letters, ref)
        done = _replay_on_node(settings_of(ctx), [node] if node else listening(settings_of(ctx)), named, timeout)
    if ref is not None:
        say(f"Submitted again as {done['id']}.")
    elif not _report(Replayed(**done)):
        raise typer.Exit(EXIT_FAILED)


def _replay_here(letters: DeadLetters, ref: str | None) -> dict[str, Any]:
    if ref is None:
        return letters.replay_all()._asdict()
    return {"id": letters.replay(_letter(letters, ref).entry)}


def _replay_on_node(settings: Settings, nodes: list[str], ref: str, timeout_s: float) -> dict[str, Any]:
    """Replays on the first of these nodes."""
    if not nodes:
        raise EngineFailed(
            f"No node listens in namespace {settings.namespace}. Start one with `rsm node --name NAME`, or add --now "
            "to replay from here."
        )
    with ordering(settings, nodes[0]) as client:
        return client.replay(ref, timeout_s)


def _report(done: Replayed) -> bool:
    """Prints what was replayed. Returns False if a letter that keeps its body could not be replayed."""
    for failure in done.failures:
        say_error(failure)
    stay = f" Left {counted(done.bodiless, 'letter')} without a body." if done.bodiless else ""
    say(f"{counted(done.sent, 'call')} submitted again.{stay}")
    return not done.failures
