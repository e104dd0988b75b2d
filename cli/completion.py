"""Ids and names that a shell completes.

On any failure, nothing is printed or raised. After half a second, what has been found by then is offered.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import typer

from rsm.broker import Settings
from rsm.broker.connection.factory import connect
from rsm.broker.protocol.ids import short_form
from rsm.broker.protocol.keys import Keys
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.lookup import Lookup
from rsm.cli.app import settings_while_completing

MOST = 100
_TIMEOUT_S = 0.5

_Read = Callable[[Settings], Iterable[str]]


def complete_call(ctx: typer.Context, incomplete: str) -> list[str]:
    """Open calls first, then finished ones, the latest first."""

    def read(settings: Settings) -> Iterable[str]:
        lookup = _lookup(settings)
        return chain(lookup.open_calls(MOST), lookup.finished_calls(MOST))

    return _offered(ctx, incomplete, read)


def complete_open_call(ctx: typer.Context, incomplete: str) -> list[str]:
    return _offered(ctx, incomplete, lambda settings: _lookup(settings).open_calls(MOST))


def complete_session(ctx: typer.Context, incomplete: str) -> list[str]:
    return _offered(ctx, incomplete, lambda settings: _lookup(settings).sessions())


def complete_engine(ctx: typer.Context, incomplete: str) -> list[str]:
    return _offered(ctx, incomplete, lambda settings: _lookup(settings).engines())


def complete_dead_letter(ctx: typer.Context, incomplete: str) -> list[str]:
    """Ids of entries and of their calls."""

    def read(settings: Settings) -> Iterator[str]:
        for letter in DeadLetters(settings, connect(settings)).ls(MOST // 2):
            yield from filter(None, (letter.entry, letter.request_id))

    return _offered(ctx, incomplete, read)


def complete_node(ctx: typer.Context, incomplete: str) -> list[str]:
    """Nodes that listen. Nothing without RQ, which is an extra."""
    with contextlib.suppress(Exception):
        from rsm.workers.supervision.node import listening  # here, so that importing RQ does not count as waiting

        return _offered(ctx, incomplete, listening)
    return []


def _lookup(settings: Settings) -> Lookup:
    return Lookup(Keys(settings.namespace), connect(settings))


def _offered(ctx: typer.Context, incomplete: str, read: _Read) -> list[str]:
    found: dict[str, None] = {}
    reader = threading.Thread(target=_collect, args=(ctx, incomplete, read, found), daemon=True)
    logging.disable()
    try:
        reader.start()
        reader.join(_TIMEOUT_S)
    finally:
        logging.disable(logging.NOTSET)
    return list(found)


def _collect(ctx: typer.Context, incomplete: str, read: _Read, found: dict[str, None]) -> None:
    with contextlib.suppress(Exception):
        for value in read(settings_while_completing(ctx)):
            name = _name(value, incomplete)
            if name.startswith(incomplete):
                found[name] = None
            if len(found) == MOST:
                return


def _name(value: str, incomplete: str) -> str:
    """The short form, as tables show it. The whole id, once its beginning is typed."""
    short = short_form(value)
    return short if short.startswith(incomplete) else value
