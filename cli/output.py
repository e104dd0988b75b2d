"""What the command prints: tables for people on stdout, JSON for programs on stdout, everything else on stderr."""

from __future__ import annotations

import codecs
import json
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rsm.broker.protocol.models import CallRecord

log = logging.getLogger("rsm.cli")
_errors_are_logged = False

# Wider than any table: output that goes to a file or a pipe is neither cut nor folded.
_UNFOLDED = 100_000
# Blanks between the columns of a table.
GAP = 2
# How wide a terminal is taken to be where there is none.
_COLUMNS = 80


def console(stderr: bool = False, wide: int = _UNFOLDED, *, unfolded: bool = False) -> Console:
    """A console on the current stdout or stderr, which tests may have replaced.

    Args:
        wide: columns off a terminal.
        unfolded: on a terminal, too, no line is folded but by the terminal itself.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = _UNFOLDED if unfolded else None if stream.isatty() else wide
    return Console(file=stream, width=width, highlight=False, emoji=False, markup=False)


def on_terminal() -> bool:
    return sys.stdout.isatty()


def console_for(form: str) -> Console:
    """For a list: "table" fits the terminal, "wide" is not folded."""
    return console(wide=_COLUMNS) if form == "table" else console(unfolded=True)


def room_for(form: str) -> int | None:
    """The columns that a list may take; none = as many as it likes."""
    return console_for(form).width if form == "table" else None


def show(*renderables: RenderableType, form: str = "table") -> None:
    """Prints tables and the like. Lines end with their last word: padded, wide ones would fill a terminal."""
    out = console_for(form)
    with out.capture() as printed:
        out.print(*renderables, sep="\n")
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in printed.get().splitlines()))
    sys.stdout.flush()


def say(sentence: str, style: str = "") -> None:
    console().print(Text(sentence, style=style), soft_wrap=True)


def say_error(sentence: str) -> None:
    """One red sentence, or a log line."""
    if _errors_are_logged:
        log.error("%s", sentence)
    else:
        console(stderr=True).print(Text(sentence, style="bold red"), soft_wrap=True)


def log_errors(wanted: bool) -> None:
    """Whether errors are log lines from now on, for a process whose stderr is for programs."""
    global _errors_are_logged
    _errors_are_logged = wanted


def note(sentence: str) -> None:
    """Something by the way; on stderr, so that stdout holds the result alone."""
    console(stderr=True).print(Text(sentence, style="dim"), soft_wrap=True)


def emit_json(value: Any) -> None:
    ascii_only = not shows_unicode(sys.stdout)
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=ascii_only, default=str) + "\n")
    sys.stdout.flush()


def shows_unicode(stream: TextIO) -> bool:
    """Whether the stream's encoding has every character."""
    return codecs.lookup(stream.encoding or "utf-8").name.startswith("utf")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, cut: Collection[str] = ()) -> Table:
    """A table; numbers stand right. Cells are shown as they are: no markup, so that no id can paint the screen.

    Args:
        cut: columns whose cells are cut where the terminal is narrow; none = words of the last column are wrapped.
    """
    made = Table(
        title=title or None,
        title_justify="left",
        header_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, GAP, 0, 0),
        show_header=any(columns),
    )
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        gives_way = column in cut if cut else i == len(columns) - 1
        made.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=not gives_way)
    for row in rows:
        made.add_row(*(cell(value, one_line=bool(cut)) for value in row))
    return made


def cell(value: Any, one_line: bool = False) -> Text:
    shown = f"{value:.2f}" if isinstance(value, float) else printable(str(value))
    style = STATE_STYLES.get(shown, "")
    return Text(shown, style=style, no_wrap=True, overflow="ellipsis") if one_line else Text(shown, style=style)


def printable(text: str) -> str:
    """A text in one line and without codes that a terminal would obey: an engine's error comes from elsewhere."""
    return "".join(c if c.isprintable() else " " for c in text)


STATE_STYLES = {
    "PENDING": "yellow",
    "RUNNING": "cyan",
    "COMPLETED": "green",
    "CANCELLED": "magenta",
    "FAILED": "red",
    "STARTING": "yellow",
    "READY": "green",
    "DRAINING": "magenta",
    "DEAD": "red",
    "ok": "green",
    "warning": "yellow",
    "problem": "bold red",
}


def seconds(ms: float) -> str:
    """A span of time for people."""
    if ms < 1000:
        return f"{max(0, ms):.0f} ms"
    return f"{ms / 1000:.1f} s" if ms < 120_000 else f"{ms / 60_000:.0f} min"


def record_json(record: CallRecord) -> Mapping[str, Any]:
    """A record with its result, as JSON can hold it. A record has no body, so no prompt is in it."""
    return asdict(record)
