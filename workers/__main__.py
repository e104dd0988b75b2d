"""The worker as a program: `python -m workers`, with its EngineConfig as JSON in RSM_ENGINE and settings in RSM_*.

`rsm worker` is the same with flags. The configuration comes by the environment because it may hold a key, and command
lines are there for everybody to read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from broker.errors import EngineIdTaken
from broker.settings import Settings
from workers.config import EngineConfig, create_backend
from workers.worker import EXIT_ID_TAKEN, Worker

log = logging.getLogger("rsm.worker")

CONFIG_VARIABLE = "RSM_ENGINE"


def run_worker(config: EngineConfig, settings: Settings, node: str = "") -> int:
    """Runs one worker in this process until it ends; returns its exit status."""
    worker = Worker(config.engine_id, create_backend(config), settings, model=config.served_name, node=node)
    try:
        return asyncio.run(worker.serve())
    except EngineIdTaken as e:
        log.error("%s", e)
        return EXIT_ID_TAKEN


def main() -> None:
    logging.basicConfig(level=os.environ.get("RSM_LOG_LEVEL", "INFO"), format="%(asctime)s %(name)s %(message)s")
    config = EngineConfig.model_validate_json(os.environ[CONFIG_VARIABLE])
    sys.exit(run_worker(config, Settings(), os.environ.get("RSM_NODE", "")))


if __name__ == "__main__":
    main()
