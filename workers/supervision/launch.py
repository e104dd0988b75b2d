"""A worker as a supervised child process, whose death is reported at once."""

from __future__ import annotations

import logging
import os
import sys

from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import BLIPS
from rsm.broker.protocol.codec import number, text
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings
from rsm.workers.config import EngineConfig
from rsm.workers.environment import (
    API_KEY_VARIABLE,
    CONFIG_VARIABLE,
    EXIT_ID_TAKEN,
    EXIT_INVALID,
    NODE_VARIABLE,
    SUPERVISOR_VARIABLE,
)
from rsm.workers.supervision.supervisor import Supervised

log = logging.getLogger("rsm.supervisor")


def worker_process(
    config: EngineConfig, settings: Settings, *, output: int | None = None, node: str = ""
) -> Supervised:
    """A worker, not yet started. It is started again when it dies, unless its engine id is taken."""
    env = settings.environment() | {CONFIG_VARIABLE: config.model_dump_json(exclude={"api_key"}), NODE_VARIABLE: node}
    env[SUPERVISOR_VARIABLE] = str(os.getpid())
    if config.api_key is not None:
        env[API_KEY_VARIABLE] = config.api_key.get_secret_value()
    return Supervised(
        f"engine {config.engine_id}",
        [sys.executable, "-P", "-m", "rsm.workers"],
        env,
        give_up=[EXIT_ID_TAKEN, EXIT_INVALID],
        output=output,
        grace_s=settings.drain_grace_s,
        died=lambda pid, _status: report_death(settings, config.engine_id, pid),
    )


def report_death(settings: Settings, engine_id: str, pid: int) -> None:
    """Gives a dead worker's calls to others now, instead of when its lease runs out. Does nothing if Redis is away."""
    transitions, server = Transitions(Keys(settings.namespace), settings), connect(settings)
    try:
        found = server.hmget(Keys(settings.namespace).engine(engine_id), ["pid", "incarnation"])
        while number(found[0]) == pid:
            reaped = execute.run(server, transitions.reap(engine_id, text(found[1])))
            if reaped.moved < settings.batch:
                break
    except BLIPS:
        log.warning("the death of engine %s is left to its lease: Redis is away", engine_id)
    finally:
        server.close()
