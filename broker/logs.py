"""One form of log lines for all programs: time, part, logger, message."""

from __future__ import annotations

import logging
import os

LEVEL_VARIABLE = "RSM_LOG_LEVEL"


def configure(part: str = "", level: str | None = None) -> None:
    """Logs to stderr. `part` names this process among several that share a terminal, such as "e0" or "router"."""
    prefix = f"%(asctime)s {part:<8} " if part else "%(asctime)s "
    logging.basicConfig(
        level=level or os.environ.get(LEVEL_VARIABLE, "INFO").upper(), format=prefix + "%(name)s %(message)s"
    )
