"""Standard streams on which a command can rely, whatever it was started with.

1. stdout raises `OutputLost` once where it cannot be written: closed, a full disk, a reader that has gone. That is no
   OSError, so nobody on the way takes it for trouble with a file or with Redis, and `ended` turns it into a sentence.
2. A process that serves goes on: what it prints on stdout is by the way.
3. stderr never raises: there is nowhere left to say so.
4. What the terminal's encoding cannot show is written as an escape; arguments are read as UTF-8 in any locale.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from rsm.cli.output import say_error

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger("rsm.cli")

_EXIT_LOST = 1
# As if SIGPIPE had ended the command, which is what shells expect of `rsm ps | head -1`.
EXIT_READER_GONE = 141


class OutputLost(Exception):
    """stdout cannot be written."""

    def __init__(self, error: OSError) -> None:
        self.reader_gone = error.errno == errno.EPIPE
        self.status = EXIT_READER_GONE if self.reader_gone else _EXIT_LOST
        why = "it is closed" if error.errno == errno.EBADF else error.strerror
        super().__init__(f"Standard output cannot be written: {why}.")


class _Out(io.FileIO):
    tolerant = False

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as e:
            lost = OutputLost(e)
        dropped = _drop(self, data)  # what follows is dropped without a word, the interpreter's last flush included
        if not self.tolerant:
            raise lost
        log.warning("%s Going on without it.", lost)
        return dropped


class _Err(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return _drop(self, data)


def _drop(stream: io.FileIO, data: ReadableBuffer) -> int:
    """Sends this and all that follows to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return memoryview(data).nbytes


def guard() -> None:
    """Puts guarded streams in the place of stdout and stderr. Once in a process, at its start."""
    if sys.stdin is None:
        sys.stdin = open(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")  # noqa: SIM115
    # In the place of a closed stdout stands one to which each write fails.
    sys.stdout = _guarded(sys.stdout, _Out, os.O_RDONLY)
    sys.stderr = _guarded(sys.stderr, _Err, os.O_WRONLY)


def _guarded(given: TextIO | None, kind: Callable[[int, str, bool], io.FileIO], missing: int) -> TextIO:
    try:
        fd = os.open(os.devnull, missing) if given is None else given.fileno()
    except (AttributeError, OSError):  # whoever has put it there looks after it
        assert given is not None  # noqa: S101
        return given
    raw = kind(fd, "w", False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8" if given is None else given.encoding,
        errors="backslashreplace",
        line_buffering=raw.isatty() or kind is _Err,
    )


def as_utf8(argument: str) -> str:
    """An argument as its user typed it where the locale has no such characters."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode("utf-8", "surrogateescape")
    return argument


def tolerate() -> None:
    """From now on an stdout that cannot be written is no reason to end."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Out):
        raw.tolerant = True


def ended(lost: OutputLost) -> int:
    """Says why the output is lost, unless its reader has just gone; returns the exit status."""
    if not lost.reader_gone:
        say_error(str(lost))
    return lost.status
