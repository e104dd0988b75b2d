"""The router as a program: `python -m router`, settings in RSM_*. `rsm router` is the same."""

from __future__ import annotations

import logging
import signal

from broker import logs
from broker.settings import Settings
from router.router import Router


def run_router(settings: Settings) -> None:
    """Runs one router in this process until SIGTERM or SIGINT."""
    router = Router(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: router.stop())
    logging.getLogger("rsm.router").info("%s serves %s, policy %s", router.name, settings.namespace, settings.policy)
    router.run()


def main() -> None:
    logs.configure("router")
    run_router(Settings())


if __name__ == "__main__":
    main()
