"""One form of log lines for all processes: time, process, level, logger, message; or JSON, an object a line."""

from __future__ import annotations

import json
import logging
import time

from rsm.broker.settings import Settings

# Libraries that report each request of ours at INFO.
_CHATTY = ("httpx", "httpcore")


def configure(settings: Settings, process: str = "", default: str = "INFO") -> None:
    """Logs to stderr.

    Args:
        process: names this one among several that share a terminal, such as "e0" or "router".
        default: the level where the settings name none.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if settings.log_format == "json" else text_formatter(process))
    level = settings.log_level or default
    logging.basicConfig(level=level, handlers=[handler])
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))


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
