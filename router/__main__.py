"""The router as a program: `python -m rsm.router`, settings in RSM_*. `rsm router` is the same."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

from rsm.broker import logs
from rsm.broker.errors import AccessDenied, EvictingRedis, InvalidRequest
from rsm.broker.settings import Settings
from rsm.router.router import Router

log = logging.getLogger("rsm.router")

# A Redis that hangs may hold the router for longer; what it has read and not placed, another one takes over.
_LEAVE_S = 5.0


def run_router(settings: Settings) -> int:
    """Runs one router in this process until SIGTERM or SIGINT; returns its exit status, 78 if Redis will not do."""
    try:
        router = Router(settings)
    except InvalidRequest as e:  # such as a policy that does not exist
        log.error("%s", e)
        return os.EX_CONFIG
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _stop(router))
    log.info("%s serves %s, policy %s", router.name, settings.namespace, settings.policy)
    try:
        router.run()
    except (AccessDenied, EvictingRedis) as e:
        log.error("%s", e)
        return os.EX_CONFIG
    return os.EX_OK


def _stop(router: Router) -> None:
    router.stop()
    bound = threading.Timer(_LEAVE_S, os._exit, [0])
    bound.daemon = True
    bound.start()


def main() -> None:
    settings = Settings()
    logs.configure(settings, "router")
    sys.exit(run_router(settings))


if __name__ == "__main__":
    main()
