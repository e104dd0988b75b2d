"""`rsm submit` and `rsm cancel`: one call from the command line."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from rsm.broker import CallEnded, CallHandle, Client, Delta, RsmError, UnknownCall
from rsm.broker.connection import execute
from rsm.broker.protocol.ids import check_id, new_id
from rsm.broker.protocol.models import EngineState, OnEngineLoss
from rsm.broker.views.lookup import Lookup
from rsm.broker.views.monitor import Monitor
from rsm.cli.app import EXIT_FAILED, app, client_of
from rsm.cli.completion import complete_open_call, complete_session
from rsm.cli.files import read_text
from rsm.cli.output import counted, emit_json, note, record_json, say, say_error
from rsm.cli.presence import Departure, Presence, TimeIsUp, undisturbed
from rsm.cli.streams import EXIT_READER_GONE, OutputLost

# How long after its deadline a call may end: routers check deadlines on a timer.
_MARGIN_S = 3.0
_CANCEL_S = 10.0

_CANCEL_MESSAGES = {
    "cancelled": "Call {} is cancelled.",
    "cancelling": "Call {} is being cancelled. Its record keeps the partial text.",
    "noted": "Call {} is not known yet. If it has been pushed, it ends as soon as a router reads it.",
    "finished": "Call {} had already ended; nothing was cancelled.",
    "unknown": "There is no call {}.",
}


@app.command()
def submit(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from stdin.")],
    session: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Session of the call. Default: a new one.",
            autocompletion=complete_session,
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print the text while it is generated. Default: on a terminal."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most tokens to generate. Default: set by the engine."),
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="Model that the engine must serve. Default: any.")] = "",
    priority: Annotated[int, typer.Option(metavar="N", help="-128 to 127; lower values run first.")] = 0,
    call_id: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="Id of the call, which makes it safe to repeat. Default: a new one."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="T", help="Sampling temperature. Default: set by the engine."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a chat message of the user.")] = False,
    parent: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Parent session, for the session of a sub-agent.", autocompletion=complete_session
        ),
    ] = None,
    on_engine_loss: Annotated[
        OnEngineLoss,
        typer.Option(
            metavar="WHAT",
            help="If its engine dies: continue on another one, restart from the beginning, or fail.",
        ),
    ] = "continue",
    json: Annotated[bool, typer.Option("--json", help="Print the record and its result as JSON.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Fail the call if it takes longer. Default: no limit.", min=0.0),
    ] = None,
) -> None:
    """Submits one call and prints its text. Exits with status 1 if the call failed or was cancelled.

    Ctrl-C, SIGTERM, a closed terminal and a closed pipe (`| head`) cancel the call.
    """
    live = sys.stdout.isatty() if stream is None else stream
    params: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    text = read_text("-", "The prompt") if prompt == "-" else prompt
    call_id = call_id or new_id()
    with client_of(ctx) as client:
        _warn_if_idle(client)
        lookup = Lookup(client.keys, client.redis)
        options: dict[str, Any] = {
            "kind": "chat.completions" if chat else "generate",
            "session": session and lookup.session_of_short_form(session),
            "id": call_id,
            "model": model,
            "priority": priority,
            "stream": live and not json,
            "timeout": timeout,
            "on_engine_loss": on_engine_loss,
            "parent_session": parent and lookup.session_of_short_form(parent),
            **{name: value for name, value in params.items() if value is not None},
        }
        body = {"messages": [{"role": "user", "content": text}]} if chat else text
        print_call = _print_record if json else _print_text
        _attend(client, call_id, lambda: client.submit(body, **options), timeout, print_call)


def _attend(
    client: Client,
    call_id: str,
    submit: Callable[[], CallHandle],
    timeout: float | None,
    print_call: Callable[[CallHandle], None],
) -> None:
    """Submits the call and prints it until it ends. Cancels it if this command ends first: nobody would read it."""
    try:
        with Presence() as presence:
            handle = submit()
            presence.until = None if timeout is None else time.monotonic() + timeout + _MARGIN_S
            print_call(handle)
            sys.stdout.flush()
    except CallEnded as e:
        raise _error_of(e) from None
    except TimeIsUp:
        raise RsmError(
            f"Call {call_id} has not ended after {timeout:g} s, and its deadline was not enforced. "
            "Run `rsm doctor` to check that a router is running."
        ) from None
    except KeyboardInterrupt:
        say_error(_stop(client, call_id, "Ctrl-C"))
        raise typer.Exit(EXIT_FAILED) from None
    except OutputLost as e:
        _stop(client, call_id, str(e))
        raise
    except Departure as e:
        outcome = _stop(client, call_id, e.why)
        if e.status != EXIT_READER_GONE:
            say_error(outcome)
        raise typer.Exit(e.status) from None


def _error_of(end: CallEnded) -> RsmError:
    record = end.record
    code = f" ({record.error_code})" if record.error_code else ""
    return RsmError(f"Call {record.request_id} {record.state.lower()}{code}: {record.error or 'no reason was given.'}")


def _print_text(handle: CallHandle) -> None:
    if not handle.streamed:
        sys.stdout.write(handle.result().text + "\n")
        return
    begun = False
    try:
        for delta in handle.stream():
            sys.stdout.write(_text_of(delta))
            sys.stdout.flush()
            begun = True
    except BaseException:
        if begun:
            with suppress(OutputLost):
                sys.stdout.write("\n")
        raise
    sys.stdout.write("\n")


def _print_record(handle: CallHandle) -> None:
    handle.wait()
    record = handle.record()  # the event of the end has no earlier facts, such as why the engine was chosen
    emit_json(record_json(record))
    record.outcome()


def _text_of(delta: Delta) -> str:
    """The text of a chunk. For a chat, it is inside the chunks of OpenAI's protocol."""
    return delta.text + "".join(_chunk_text(jsonlib.loads(chunk)) for chunk in delta.chunks)


def _chunk_text(chunk: Any) -> str:
    choices = chunk.get("choices") or [{}]
    return choices[0].get("text") or (choices[0].get("delta") or {}).get("content") or ""


def _stop(client: Client, call_id: str, why: str) -> str:
    """Cancels the call. Returns a message that says what happened to it."""
    with undisturbed():
        client.cancel(call_id, f"{why} in `rsm submit`")
        try:
            record = client.handle(call_id).wait(_CANCEL_S)
        except TimeoutError:
            return f"Call {call_id} is being cancelled; its engine has not answered yet."
        except UnknownCall:
            return f"Call {call_id} was not submitted."
    return f"Call {call_id} {record.state.lower()}."


def _warn_if_idle(client: Client) -> None:
    engines = Monitor(client.settings, client.redis).engines()
    if not any(e["state"] == EngineState.READY for e in engines):
        note("No engine is ready, so the call waits for one. Run `rsm engines` or `rsm doctor` for details.")


@app.command()
def cancel(
    ctx: typer.Context,
    call_id: Annotated[
        str | None,
        typer.Argument(metavar="CALL", show_default=False, help="Id of the call.", autocompletion=complete_open_call),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Cancel all calls of this session and its sub-agents, on all engines.",
            autocompletion=complete_session,
        ),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="With --session: leave its sub-agents running.")] = False,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Reason to keep in the records.")] = "",
) -> None:
    """Cancels a call, or all calls of a session. Exits with status 1 if there was nothing to cancel."""
    if (call_id is None) == (session is None):
        raise typer.BadParameter("name either a call or a --session")
    with client_of(ctx) as client:
        lookup = Lookup(client.keys, client.redis)
        if session is not None:
            whole = lookup.session(session)
            ended = client.cancel_session(whole, reason, descendants=not alone)
            say(
                f"{counted(ended, 'call')} of session {whole} cancelled."
                if ended
                else f"Session {whole} has no unfinished calls."
            )
            took_effect = ended > 0
        else:
            took_effect = _cancel_one(client, lookup.call(call_id or ""), reason)
    if not took_effect:
        raise typer.Exit(EXIT_FAILED)


def _cancel_one(client: Client, call_id: str, reason: str) -> bool:
    outcome = execute.run(client.redis, client.transitions.cancel(check_id(call_id, "id"), reason))
    message = _CANCEL_MESSAGES[outcome].format(call_id)
    if outcome in ("finished", "unknown"):
        say_error(message)
        return False
    say(message)
    return True
