"""The worker as a program: `python -m rsm.workers`, with its EngineConfig as JSON in RSM_ENGINE and settings in RSM_*.

`rsm worker` does the same with flags. The configuration is passed in the environment because it may hold a key, and
every user of the machine can read command lines. With --supervised this process is the worker's supervisor instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable

from pydantic import ValidationError

from rsm.broker import logs
from rsm.broker.config_errors import explain
from rsm.broker.errors import AccessDenied, EngineIdTaken, EvictingRedis, InvalidRequest
from rsm.broker.settings import Settings
from rsm.workers.backends.base import Backend, Refused
from rsm.workers.backends.factory import create_backend
from rsm.workers.config import EngineConfig
from rsm.workers.environment import (
    BIRTH_VARIABLE,
    CONFIG_VARIABLE,
    EXIT_ID_TAKEN,
    EXIT_INVALID,
    NODE_VARIABLE,
    SUPERVISED_FLAG,
    SUPERVISOR_VARIABLE,
    TENTATIVE_FLAG,
)
from rsm.workers.runtime.watchdog import HardExitTimer
from rsm.workers.runtime.worker import Worker
from rsm.workers.supervision.launch import worker_process

log = logging.getLogger("rsm.worker")

_M_ARENA_MAX = -8  # malloc.h


def share_heaps() -> None:
    """Lets the worker's threads share two malloc arenas (glibc) instead of one each; saves most of a MiB."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def run_worker(config: EngineConfig, settings: Settings, node: str = "") -> int:
    """Runs one worker in this process until it ends; returns its exit status."""
    share_heaps()
    backend: Backend
    try:
        backend = create_backend(config, settings)
    except InvalidRequest as e:
        backend = Refused(str(e))  # the engine's record then has the error, for those who wait for the engine
        settings = settings.model_copy(update={"service_unit": "tokens"})
    try:
        exit_timer = HardExitTimer(settings, armed=True)
        worker = Worker(
            config.engine_id,
            backend,
            settings,
            model=config.served_name,
            node=node,
            supervisor=os.environ.get(SUPERVISOR_VARIABLE, ""),
            birth=os.environ.get(BIRTH_VARIABLE, ""),
            exit_timer=exit_timer,
        )
    except InvalidRequest as e:
        log.error("%s", e)
        return EXIT_INVALID
    threading.excepthook = lambda failed: _handle_thread_death(worker, failed)
    try:
        return asyncio.run(worker.serve())
    except EngineIdTaken as e:
        log.error("%s", e)
        return EXIT_ID_TAKEN
    except (AccessDenied, EvictingRedis) as e:
        log.error("%s", e)
        return EXIT_INVALID


def _handle_thread_death(worker: Worker, failed: threading.ExceptHookArgs) -> None:
    """A worker that lost a thread would look alive and do nothing. It exits, so that the supervisor restarts it."""
    threading.__excepthook__(failed)
    worker.fail(f"its thread {failed.thread.name if failed.thread else ''} ended with {failed.exc_type.__name__}")


def run_supervised(config: EngineConfig, settings: Settings, node: str = "", *, tentative: bool = False) -> int:
    """Keeps a worker running in a child process until SIGTERM or a clean exit of the worker; returns its status.

    With `tentative` it also stops when its parent ends, unless the parent has confirmed it by a byte on stdin.
    """
    worker = worker_process(config, settings, node=node)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.request_stop())
    worker.start()
    if tentative:
        args = (worker.request_stop,)
        threading.Thread(target=_stop_unless_confirmed, args=args, name="rsm-confirm", daemon=True).start()
    return worker.wait()


def _stop_unless_confirmed(stop: Callable[[], None]) -> None:
    if not os.read(sys.stdin.fileno(), 1):
        stop()


def main() -> None:
    try:
        with logs.held_back():
            config, settings = EngineConfig.model_validate_json(os.environ[CONFIG_VARIABLE]), Settings()
            logs.configure(settings, config.engine_id)
    except ValidationError as e:
        log.error("%s", explain(e))
        sys.exit(EXIT_INVALID)
    node, flags = os.environ.get(NODE_VARIABLE, ""), sys.argv[1:]
    if SUPERVISED_FLAG in flags:
        sys.exit(run_supervised(config, settings, node, tentative=TENTATIVE_FLAG in flags))
    sys.exit(run_worker(config, settings, node))


if __name__ == "__main__":
    main()
