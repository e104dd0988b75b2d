"""The router as a program: `python -m rsm.router`, with settings in RSM_*. `rsm router` does the same."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

from pydantic import ValidationError

from rsm.broker import logs
from rsm.broker.config_errors import explain
from rsm.broker.errors import AccessDenied, EvictingRedis, InvalidRequest
from rsm.broker.settings import Settings
from rsm.router.router import Router

log = logging.getLogger("rsm.router")

# The longest orderly stop, in case Redis hangs. Another router takes over the entries that this one has not placed.
_LEAVE_S = 5.0


def run_router(settings: Settings) -> int:
    """Runs one router in this process until SIGTERM or SIGINT. Returns its exit status; 78 = wrong configuration."""
    try:
        router = Router(settings)
    except InvalidRequest as e:  # its policy
        log.error("%s", e)
        return os.EX_CONFIG
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _stop(router))
    log.info("%s serves namespace %s with policy %s", router.name, settings.namespace, settings.policy)
    try:
        router.run()
    except (AccessDenied, EvictingRedis) as e:
        log.error("%s", e)
        return os.EX_CONFIG
    return os.EX_OK


def _stop(router: Router) -> None:
    router.stop()
    timer = threading.Timer(_LEAVE_S, os._exit, [0])
    timer.daemon = True
    timer.start()


def main() -> None:
    try:
        with logs.held_back():
            settings = Settings()
            logs.configure(settings, "router")
    except ValidationError as e:
        log.error("%s", explain(e))
        sys.exit(os.EX_CONFIG)
    sys.exit(run_router(settings))


if __name__ == "__main__":
    main()
