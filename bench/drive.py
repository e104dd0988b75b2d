"""A router and a producer in one process, for a worker that is measured elsewhere: `python -m bench.drive CALLS`."""

from __future__ import annotations

import sys
import threading

from bench.ours import throughput
from bench.parts import wait_ready
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
