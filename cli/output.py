"""What commands print: tables and JSON on stdout, everything else on stderr."""

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

# Wider than any table: output to a file or a pipe is neither cut nor folded.
_UNFOLDED = 100_000
# Blanks between the columns of a table.
GAP = 2
# The assumed width where there is no terminal.
_COLUMNS = 80


def console(stderr: bool = False, wide: int = _UNFOLDED, *, unfolded: bool = False) -> Console:
    """A console on the current stdout or stderr, which tests may have replaced.

    Args:
        wide: the width where there is no terminal.
        unfolded: whether a terminal, too, gets lines of any length.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = _UNFOLDED if unfolded else None if stream.isatty() else wide
    return Console(file=stream, width=width, highlight=False, emoji=False, markup=False)


def on_terminal() -> bool:
    return sys.stdout.isatty()


def console_for(form: str) -> Console:
    """The console for a list: "table" fits the terminal, "wide" is not folded."""
    return console(wide=_COLUMNS) if form == "table" else console(unfolded=True)


def room_for(form: str) -> int | None:
    """The width that a list may take. None: any."""
    return console_for(form).width if form == "table" else None


def show(*renderables: RenderableType, form: str = "table") -> None:
    """Prints tables and the like, without trailing blanks: padded wide lines would fill a terminal."""
    out = console_for(form)
    with out.capture() as printed:
        out.print(*renderables, sep="\n")
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in printed.get().splitlines()))
    sys.stdout.flush()


def say(message: str, style: str = "") -> None:
    console().print(Text(message, style=style), soft_wrap=True)


def say_error(message: str) -> None:
    """Prints a red line on stderr, or logs the message."""
    if _errors_are_logged:
        log.error("%s", message)
    else:
        console(stderr=True).print(Text(message, style="bold red"), soft_wrap=True)


def log_errors(wanted: bool) -> None:
    """Sets whether errors are log lines, for processes whose stderr is read by programs."""
    global _errors_are_logged
    _errors_are_logged = wanted


def note(message: str) -> None:
    """Prints a remark on stderr, so that stdout holds only the result."""
    console(stderr=True).print(Text(message, style="dim"), soft_wrap=True)


def emit_json(value: Any) -> None:
    ascii_only = not shows_unicode(sys.stdout)
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=ascii_only, default=str) + "\n")
    sys.stdout.flush()


def shows_unicode(stream: TextIO) -> bool:
    """Whether the stream's encoding can express every character."""
    return codecs.lookup(stream.encoding or "utf-8").name.startswith("utf")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, cut: Collection[str] = ()) -> Table:
    """A table with numbers aligned right. Cells are not parsed as markup, so no id can change the screen.

    Args:
        cut: columns whose cells are cut on a narrow terminal. By default, the last column wraps instead.
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
        shrinks = column in cut if cut else i == len(columns) - 1
        made.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=not shrinks)
    for row in rows:
        made.add_row(*(cell(value, one_line=bool(cut)) for value in row))
    return made


def cell(value: Any, one_line: bool = False) -> Text:
    shown = f"{value:.2f}" if isinstance(value, float) else printable(str(value))
    style = STATE_STYLES.get(shown, "")
    return Text(shown, style=style, no_wrap=True, overflow="ellipsis") if one_line else Text(shown, style=style)


def printable(text: str) -> str:
    """A text on one line, without terminal control codes: some texts, such as errors of engines, are not trusted."""
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


def counted(count: int, noun: str) -> str:
    """A count and its noun: "1 call", "2 calls"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def seconds(ms: float) -> str:
    """A time span for people."""
    if ms < 1000:
        return f"{max(0, ms):.0f} ms"
    return f"{ms / 1000:.1f} s" if ms < 120_000 else f"{ms / 60_000:.0f} min"


def record_json(record: CallRecord) -> Mapping[str, Any]:
    """A record and its result, ready for JSON. Records hold no body, so the output holds no prompt."""
    return asdict(record)
