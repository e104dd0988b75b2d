"""Ids that a shell offers for completion.

Whatever goes wrong, nothing is printed and nothing raised, and nobody waits for longer than a moment: the ids that
Redis has named by then are offered.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import typer

from rsm.broker.connection.factory import connect
from rsm.broker.protocol.ids import short_form
from rsm.broker.protocol.keys import Keys
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.lookup import Lookup
from rsm.cli.app import settings_while_completing

MOST = 100
_PATIENCE_S = 0.5

_Read = Callable[[Lookup, DeadLetters], Iterable[str]]


def complete_call(ctx: typer.Context, incomplete: str) -> list[str]:
    """Open calls first, then those that ended last."""
    return _offered(ctx, incomplete, lambda look, _: chain(look.open_calls(MOST), look.finished_calls(MOST)))


def complete_open_call(ctx: typer.Context, incomplete: str) -> list[str]:
    return _offered(ctx, incomplete, lambda look, _: look.open_calls(MOST))


def complete_session(ctx: typer.Context, incomplete: str) -> list[str]:
    return _offered(ctx, incomplete, lambda look, _: look.sessions())


def complete_engine(ctx: typer.Context, incomplete: str) -> list[str]:
    return _offered(ctx, incomplete, lambda look, _: look.engines())


def complete_dead_letter(ctx: typer.Context, incomplete: str) -> list[str]:
    """Entries, and the calls that they are of."""

    def read(_: Lookup, letters: DeadLetters) -> Iterator[str]:
        for letter in letters.ls(MOST // 2):
            yield from filter(None, (letter.entry, letter.request_id))

    return _offered(ctx, incomplete, read)


def _offered(ctx: typer.Context, incomplete: str, read: _Read) -> list[str]:
    found: dict[str, None] = {}
    reader = threading.Thread(target=_collect, args=(ctx, incomplete, read, found), daemon=True)
    logging.disable()
    try:
        reader.start()
        reader.join(_PATIENCE_S)
    finally:
        logging.disable(logging.NOTSET)
    return list(found)


def _collect(ctx: typer.Context, incomplete: str, read: _Read, found: dict[str, None]) -> None:
    with contextlib.suppress(Exception):
        settings = settings_while_completing(ctx)
        server = connect(settings)
        for value in read(Lookup(Keys(settings.namespace), server), DeadLetters(settings, server)):
            name = _name(value, incomplete)
            if name.startswith(incomplete):
                found[name] = None
            if len(found) == MOST:
                return


def _name(value: str, incomplete: str) -> str:
    """The short form, as tables show it; the whole id once its beginning is typed."""
    short = short_form(value)
    return short if short.startswith(incomplete) else value
