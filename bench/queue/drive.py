"""Runs a router and a producer in one process, for a worker in another: `python -m bench.queue.drive CALLS`."""

from __future__ import annotations

import sys
import threading

from bench.processes import wait_ready
from bench.queue.ours import throughput
from rsm.broker import Client, Settings
from rsm.router.router import Router


def main() -> None:
    settings = Settings()
    router = Router(settings)
    thread = threading.Thread(target=router.run)
    thread.start()
    wait_ready(settings, ["e0"])
    with Client(settings=settings) as client:
        throughput(client, int(sys.argv[1]), 100)
    router.stop()
    thread.join()


if __name__ == "__main__":
    main()
