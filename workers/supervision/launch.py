"""A worker as a supervised child process. Its death is reported at once."""

from __future__ import annotations

import logging
import os
import sys

from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import OUTAGES
from rsm.broker.protocol.codec import text
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
    """A worker, not yet started. It is restarted when it dies, unless its engine id is taken or its config is wrong."""
    env = settings.environment() | {
        CONFIG_VARIABLE: config.as_json(),
        NODE_VARIABLE: node,
    }
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
        died=lambda birth, _status: report_death(settings, config.engine_id, birth),
    )


def is_of(incarnation: str, birth: str) -> bool:
    """Whether an incarnation belongs to the process with that birth."""
    return incarnation == birth or incarnation.startswith(f"{birth}.")


def report_death(settings: Settings, engine_id: str, birth: str) -> None:
    """Moves a dead worker's calls to other engines now, before its lease expires. Does nothing if Redis is unreachable
    or a successor has the engine id.

    Args:
        birth: the birth of the dead process, or one of its incarnations.
    """
    transitions, server = Transitions(Keys(settings.namespace), settings), connect(settings)
    try:
        incarnation = text(server.hget(Keys(settings.namespace).engine(engine_id), "incarnation"))
        while is_of(incarnation, birth):
            reaped = execute.run(server, transitions.reap(engine_id, incarnation))
            if reaped.moved < settings.batch:
                break
    except OUTAGES:
        log.warning("Redis is unreachable: the death of engine %s takes effect when its lease expires", engine_id)
    finally:
        server.close()
