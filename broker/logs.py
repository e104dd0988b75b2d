"""The log format of all processes: time, process, level, logger, message; or JSON, one object per line."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from types import TracebackType

from rsm.broker.settings import Settings

# Libraries that log each of our requests at INFO.
_CHATTY = ("httpx", "httpcore")
_MAX_BUFFERED = 1000

log = logging.getLogger("rsm")


class _Handler(logging.Handler):
    """Writes to the current `sys.stderr`, which may change after this handler is made."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_handler = _Handler()


def configure(settings: Settings, process: str = "", default: str = "INFO") -> None:
    """Logs to stderr. May be called again, by a process that learns its name later.

    Args:
        process: the name of this process, such as "e0" or "router", for when several share a terminal.
        default: the level if the settings do not set one.
    """
    as_json = settings.log_format == "json"
    _handler.setFormatter(JsonFormatter(process) if as_json else text_formatter(process))
    root, level = logging.getLogger(), settings.log_level or default
    root.addHandler(_handler)
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))
    if as_json:
        logging.captureWarnings(True)
        sys.excepthook = _log_crash


@contextmanager
def held_back() -> Iterator[None]:
    """Buffers log records until the end of the block, where `configure` has set the format."""
    root, early = logging.getLogger(), MemoryHandler(_MAX_BUFFERED, logging.CRITICAL + 1, flushOnClose=False)
    root.addHandler(early)
    try:
        yield
    finally:
        root.removeHandler(early)
        for record in early.buffer:
            if record.levelno >= root.level:
                root.handle(record)
        early.close()


def _log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        log.critical("the process ends because of an unexpected error", exc_info=(kind, error, trace))


def text_formatter(process: str) -> logging.Formatter:
    prefix = f"%(asctime)s {process:<8} " if process else "%(asctime)s "
    return logging.Formatter(prefix + "%(levelname)-7s %(name)s %(message)s")


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "process", "logger", "message", "exception"?}`; times as ISO 8601 in UTC."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        row = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=False)
