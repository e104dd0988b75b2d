"""Standard streams that a command can rely on, whatever it was started with.

1. stdout raises `OutputLost` once if it cannot be written: closed, disk full, reader gone. That is not an OSError, so
   no handler on the way mistakes it for trouble with a file or with Redis. `ended` reports it.
2. A process that serves continues: its output on stdout does not matter.
3. stderr never raises: there is nowhere left to report to.
4. Characters that the terminal's encoding lacks are escaped. Arguments are read as UTF-8 in any locale.
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
# As after SIGPIPE, which shells expect of `rsm ps | head -1`.
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
        dropped = _drop(self, data)  # all that follows is dropped silently, even the interpreter's last flush
        if not self.tolerant:
            raise lost
        log.warning("%s Continuing without it.", lost)
        return dropped


class _Err(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return _drop(self, data)


def _drop(stream: io.FileIO, data: ReadableBuffer) -> int:
    """Discards this data and all that follows."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
    return memoryview(data).nbytes


def guard() -> None:
    """Replaces stdout and stderr by guarded streams. Called once, when a process starts."""
    if sys.stdin is None:
        sys.stdin = open(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")  # noqa: SIM115
    # A closed stdout is replaced by one that cannot be written.
    sys.stdout = _guarded(sys.stdout, _Out, os.O_RDONLY)
    sys.stderr = _guarded(sys.stderr, _Err, os.O_WRONLY)


def _guarded(given: TextIO | None, kind: Callable[[int, str, bool], io.FileIO], missing: int) -> TextIO:
    try:
        fd = os.open(os.devnull, missing) if given is None else given.fileno()
    except (AttributeError, OSError):  # not a file, as in a test
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
    """An argument as the user typed it, also in a locale that lacks its characters."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode("utf-8", "surrogateescape")
    return argument


def tolerate() -> None:
    """Lets the process continue if stdout cannot be written."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Out):
        raw.tolerant = True


def ended(lost: OutputLost) -> int:
    """Reports why the output is lost, unless its reader has gone. Returns the exit status."""
    if not lost.reader_gone:
        say_error(str(lost))
    return lost.status
