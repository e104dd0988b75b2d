"""Runs inside vLLM's EngineCore process: a scheduler factory that ends this process when the worker dies.

vLLM's EngineCore would outlive a killed worker (SIGKILL, out of memory) and keep the GPU's memory. It creates its
scheduler in its main thread, so that is the place to ask the kernel for a signal on the parent's death.
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

# The keys in vLLM's `additional_config` of the scheduler class to create: the user's, PLAS, or "" for vLLM's own. The
# configuration is passed to the engine process; the environment belongs to the user.
CONFIG_KEY, SCHEDULER = "rsm", "scheduler_cls"

_PR_SET_PDEATHSIG = 1


def make_scheduler(*args: Any, **kwargs: Any) -> Any:
    """The scheduler factory that vLLM calls in place of a class. Returns the scheduler that was configured."""
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    return create(setting(config, SCHEDULER), *args, **kwargs)


def create(named: str, *args: Any, **kwargs: Any) -> Any:
    """Creates the scheduler from the dotted path of a class or factory; "" = vLLM's own."""
    die_with_parent()
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    return _scheduler_class(named, config)(*args, **kwargs)


def die_with_parent() -> None:
    """Makes the kernel send SIGTERM to this process when the thread that started it ends; vLLM then exits."""
    parent = multiprocessing.parent_process()
    if parent is None:  # not started by multiprocessing but by something that supervises it, such as Ray
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent.pid:  # the parent died before the call
        os.kill(os.getpid(), signal.SIGTERM)


def setting(config: Any, name: str) -> Any:
    """One of this project's entries in vLLM's configuration; "" if it is missing."""
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
