"""What the command prints: tables for people on stdout, JSON for programs on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rsm.broker.protocol.models import CallRecord

# Wide enough for every table: output that goes to a file or a pipe is not cut to 80 columns.
_WIDE = 200


def console(stderr: bool = False, wide: int = _WIDE) -> Console:
    """A console on the current stdout or stderr, which tests may have replaced; `wide`: columns off a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else wide, highlight=False, emoji=False, markup=False)


def say(sentence: str, style: str = "") -> None:
    console().print(Text(sentence, style=style), soft_wrap=True)


def say_error(sentence: str) -> None:
    """One red sentence."""
    console(stderr=True).print(Text(sentence, style="bold red"), soft_wrap=True)


def note(sentence: str) -> None:
    """Something by the way; on stderr, so that stdout holds the result alone."""
    console(stderr=True).print(Text(sentence, style="dim"), soft_wrap=True)


def emit_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table; numbers stand right. Cells are shown as they are: no markup, so that no id can paint the screen."""
    made = Table(
        title=title or None,
        title_justify="left",
        header_style="bold",
        box=None,
        pad_edge=False,
        show_header=any(columns),
    )
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        made.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell(value) for value in row))
    return made


def cell(value: Any) -> Text:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return Text(shown, style=STATE_STYLES.get(shown, ""))


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
