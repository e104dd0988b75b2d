"""`rsm submit` and `rsm cancel`: one call from the command line."""

from __future__ import annotations

import json as jsonlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from rsm.broker import CallEnded, CallHandle, Client, Delta, RsmError
from rsm.broker.connection import execute
from rsm.broker.protocol.ids import check_id
from rsm.broker.protocol.models import EngineState, OnEngineLoss
from rsm.broker.views.monitor import Monitor
from rsm.cli.app import EXIT_FAILED, app, client_of
from rsm.cli.output import emit_json, note, record_json, say, say_error

# What the end of a call may take beyond its deadline: the router looks for passed ones on a timer.
_MARGIN_S = 3.0
_CANCEL_S = 10.0

_CANCEL_SAYS = {
    "cancelled": "Call {} is cancelled.",
    "cancelling": "Call {} is being stopped; its partial text stays in its record.",
    "noted": "Call {} is not known yet; it ends as soon as a router reads it.",
    "finished": "Call {} had ended before; nothing was cancelled.",
    "unknown": "There is no call {}.",
}


@app.command()
def submit(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    session: Annotated[str | None, typer.Option(help="Program this call belongs to; none = one of its own.")] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print the text as it comes; the default on a terminal.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    model: Annotated[str, typer.Option(help="Only engines that serve it; none = any.")] = "",
    priority: Annotated[int, typer.Option(help="-128 to 127; lower is earlier.")] = 0,
    call_id: Annotated[str | None, typer.Option("--id", help="Chosen by you, it makes a repetition safe.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a chat message of the user.")] = False,
    parent: Annotated[str | None, typer.Option(help="Session that this one works for, as its sub-agent.")] = None,
    on_engine_loss: Annotated[
        OnEngineLoss, typer.Option(help="Its engine's process dies: go on elsewhere, begin anew, or fail.")
    ] = "continue",
    json: Annotated[bool, typer.Option("--json", help="The record with its result, as JSON.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds; a call not finished by then fails.", min=0.0)] = None,
) -> None:
    """Sends one call and prints its text. Ctrl-C cancels it. Exit status 1 if it failed or was cancelled."""
    live = sys.stdout.isatty() if stream is None else stream
    params: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    text = sys.stdin.read() if prompt == "-" else prompt
    with client_of(ctx) as client:
        _warn_if_idle(client)
        handle = client.submit(
            {"messages": [{"role": "user", "content": text}]} if chat else text,
            kind="chat.completions" if chat else "generate",
            session=session,
            id=call_id,
            model=model,
            priority=priority,
            stream=live and not json,
            timeout=timeout,
            on_engine_loss=on_engine_loss,
            parent_session=parent,
            **{name: value for name, value in params.items() if value is not None},
        )
        _follow(handle, timeout, _print_record if json else _print_text)


def _follow(handle: CallHandle, timeout: float | None, print_call: Callable[[CallHandle], None]) -> None:
    """Prints the call until it ends, however it ends."""
    try:
        with _at_most(None if timeout is None else timeout + _MARGIN_S):
            print_call(handle)
    except CallEnded as e:
        raise _sentence(e) from None
    except _TimeIsUp:
        raise RsmError(
            f"Call {handle.id} has not ended after {timeout:g} s, nor has its deadline been seen: "
            "is a router running? `rsm doctor` says."
        ) from None
    except KeyboardInterrupt:
        _stop(handle)


def _sentence(end: CallEnded) -> RsmError:
    record = end.record
    code = f" ({record.error_code})" if record.error_code else ""
    return RsmError(f"Call {record.request_id} {record.state.lower()}{code}: {record.error or 'no reason was given.'}")


def _print_text(handle: CallHandle) -> None:
    write = sys.stdout.write
    if not handle.streamed:
        write(handle.result().text + "\n")
        return
    try:
        for delta in handle.stream():
            write(_text_of(delta))
            sys.stdout.flush()
    finally:
        write("\n")


def _print_record(handle: CallHandle) -> None:
    handle.wait()
    record = handle.record()  # the end's news leave out what was known before, such as why the engine was chosen
    emit_json(record_json(record))
    record.outcome()


def _text_of(delta: Delta) -> str:
    """The text in a piece; that of a chat comes inside the chunks of OpenAI's protocol."""
    return delta.text + "".join(_chunk_text(jsonlib.loads(chunk)) for chunk in delta.chunks)


def _chunk_text(chunk: Any) -> str:
    choices = chunk.get("choices") or [{}]
    return choices[0].get("text") or (choices[0].get("delta") or {}).get("content") or ""


def _stop(handle: CallHandle) -> None:
    """Ctrl-C: the call must not go on unseen."""
    handle.cancel("Ctrl-C in `rsm submit`")
    try:
        record = handle.wait(_CANCEL_S)
    except TimeoutError:
        raise RsmError(f"Call {handle.id} is being cancelled; its engine has not answered yet.") from None
    raise RsmError(f"Call {handle.id} {record.state.lower()}.")


def _warn_if_idle(client: Client) -> None:
    engines = Monitor(client.settings, client.redis).engines()
    if not any(e["state"] == EngineState.READY for e in engines):
        note("No engine is ready: the call waits until one is. `rsm engines` and `rsm doctor` say more.")


class _TimeIsUp(BaseException):
    """No Exception, and no TimeoutError above all: the Redis client would take that for a cut line and try again."""


@contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    """Raises _TimeIsUp in the main thread after so many seconds."""
    if seconds is None:
        yield
        return

    def ring(*_: object) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@app.command()
def cancel(
    ctx: typer.Context,
    call_id: Annotated[str | None, typer.Argument(metavar="[CALL]", show_default=False)] = None,
    session: Annotated[
        str | None, typer.Option(help="All calls of this session and of its sub-agents, on all engines.")
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Of the session alone: its sub-agents go on.")] = False,
    reason: Annotated[str, typer.Option(help="Kept in the records.")] = "",
) -> None:
    """Cancels a call, or all calls of a session. Exit status 1 if there was nothing to cancel."""
    if (call_id is None) == (session is None):
        raise typer.BadParameter("name either a call or a --session")
    with client_of(ctx) as client:
        if session is not None:
            ended = client.cancel_session(session, reason, descendants=not alone)
            say(f"{ended} calls of session {session} cancelled." if ended else f"Session {session} has no open call.")
            took_effect = ended > 0
        else:
            took_effect = _cancel_one(client, call_id or "", reason)
    if not took_effect:
        raise typer.Exit(EXIT_FAILED)


def _cancel_one(client: Client, call_id: str, reason: str) -> bool:
    outcome = execute.run(client.redis, client.transitions.cancel(check_id(call_id, "id"), reason))
    sentence = _CANCEL_SAYS[outcome].format(call_id)
    if outcome in ("finished", "unknown"):
        say_error(sentence)
        return False
    say(sentence)
    return True
