"""Why vLLM did not start, and whether trying again could help."""

from __future__ import annotations

import re
from pathlib import Path

from rsm.broker.protocol.ids import shorten
from rsm.workers.backends.base import EngineDied, EngineMisconfigured
from rsm.workers.backends.vllm.start.output import Output, is_consequence

_MAX_CAUSE = 400  # characters
# What may be otherwise the next time: a network; and once the engine runs, memory that one before it still holds, or a
# driver.
_NETWORK = re.compile(r"timed? ?out|connect|temporar|resolve", re.IGNORECASE)
_PASSING = re.compile(rf"{_NETWORK.pattern}|memory|CUDA|NCCL|NVML|GPU|resource|too many|address", re.IGNORECASE)
# Exceptions that say the same again, however often it is tried.
_LASTING = {
    "AssertionError", "AttributeError", "FileNotFoundError", "HFValidationError", "ImportError", "JSONDecodeError",
    "KeyError", "ModuleNotFoundError", "NotADirectoryError", "NotImplementedError", "OSError",
    "RepositoryNotFoundError", "TypeError", "ValidationError", "ValueError",
}  # fmt: skip


def misconfigured(error: Exception) -> EngineDied:
    """What it means that vLLM's configuration could not be made: wrong it stays, unless a network was in the way."""
    cause = f"{type(error).__name__}: {error}"
    kind = EngineDied if _NETWORK.search(cause) else EngineMisconfigured
    return kind(_sentence(cause))


def failure(error: Exception, output: Output) -> EngineDied:
    """What a failed start means: its cause, which may be another process's, and whether it will pass."""
    cause = f"{type(error).__name__}: {error}"
    if is_consequence(str(error)):
        cause = output.cause() or cause
    lasting = cause.partition(":")[0] in _LASTING and not _PASSING.search(cause)
    kind = EngineMisconfigured if lasting else EngineDied
    return kind(_sentence(cause))


def _sentence(cause: str) -> str:
    return f"vLLM could not start: {shorten(' '.join(cause.split()), _MAX_CAUSE)}"


def require_model(model: str) -> None:
    """Raises EngineMisconfigured for a path to a model where there is none: vLLM would look for it in the network."""
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().exists():
        raise EngineMisconfigured(f"There is no model at {model}: give a folder that exists, or a model's name.")
