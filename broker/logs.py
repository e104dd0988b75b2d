"""One form of log lines for all processes: time, process, level, logger, message; or JSON, an object a line."""

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

# Libraries that report each request of ours at INFO.
_CHATTY = ("httpx", "httpcore")
_HELD_BACK = 1000

log = logging.getLogger("rsm")


class _Handler(logging.Handler):
    """Writes to whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_handler = _Handler()


def configure(settings: Settings, process: str = "", default: str = "INFO") -> None:
    """Logs to stderr. May be called again, by a process that has found out what it is.

    Args:
        process: names this one among several that share a terminal, such as "e0" or "router".
        default: the level where the settings name none.
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
    """Keeps what is logged until the end of the block, by when `configure` knows its form."""
    root, early = logging.getLogger(), MemoryHandler(_HELD_BACK, logging.CRITICAL + 1, flushOnClose=False)
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
        log.critical("ended by an error that nobody expected", exc_info=(kind, error, trace))


def text_formatter(process: str) -> logging.Formatter:
    prefix = f"%(asctime)s {process:<8} " if process else "%(asctime)s "
    return logging.Formatter(prefix + "%(levelname)-7s %(name)s %(message)s")


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "process", "logger", "message", "exception"?}`; times as ISO 8601 in UTC."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        row = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=False)
