"""What runs inside vLLM's EngineCore process: a scheduler factory that ties that process's life to the worker's.

vLLM's EngineCore outlives a worker that is killed (SIGKILL, out of memory), and holds the GPU's memory for ever. It
asks for its scheduler in its main thread: that is the place to ask the kernel for a signal on the parent's death.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
from typing import Any

FACTORY = "rsm.workers.backends.vllm.guard.make_scheduler"

PLAS = "rsm.workers.scheduling.vllm_plugin.make_scheduler"

# Where in vLLM's `additional_config` the scheduler class stands that is to be made: the user's, or PLAS; none: vLLM's
# own. The configuration travels to the engine's process; the environment is the user's.
CONFIG_KEY, SCHEDULER = "rsm", "scheduler_cls"

_PR_SET_PDEATHSIG = 1


def make_scheduler(*args: Any, **kwargs: Any) -> Any:
    """Stands in for the scheduler class: takes what vLLM gives, returns the scheduler that would have been used."""
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    return made(given(config, SCHEDULER), *args, **kwargs)


def made(named: str, *args: Any, **kwargs: Any) -> Any:
    """The scheduler of a class or factory, by its dotted path; "" = vLLM's own."""
    die_with_parent()
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    return _scheduler_class(named, config)(*args, **kwargs)


def die_with_parent() -> None:
    """Has the kernel send SIGTERM to this process when the thread that started it is gone; vLLM then ends by itself."""
    parent = multiprocessing.parent_process()
    if parent is None:  # started by something else than multiprocessing (Ray), which looks after it
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent.pid:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)


def given(config: Any, name: str) -> Any:
    """One of our own entries in vLLM's configuration, "" if it is not there."""
    ours = getattr(config, "additional_config", None)
    return ours.get(CONFIG_KEY, {}).get(name, "") if isinstance(ours, dict) else ""


def _scheduler_class(named: str, config: Any) -> Any:
    if named:
        module, _, name = named.rpartition(".")
        return getattr(importlib.import_module(module), name)
    if config.scheduler_config.async_scheduling:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        return AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    return Scheduler
