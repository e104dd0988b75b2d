"""The cause of a failed start of vLLM, and whether a retry could help."""

from __future__ import annotations

import re
from pathlib import Path

from rsm.broker.protocol.ids import shorten
from rsm.workers.backends.base import EngineDied, EngineMisconfigured
from rsm.workers.backends.vllm.start.output import Output, is_consequence

_MAX_CAUSE = 400  # characters
# Causes that may be gone the next time: the network; once the engine runs, also memory that the last engine still uses,
# or a driver.
_NETWORK = re.compile(r"timed? ?out|connect|temporar|resolve", re.IGNORECASE)
_TEMPORARY = re.compile(rf"{_NETWORK.pattern}|memory|CUDA|NCCL|NVML|GPU|resource|too many|address", re.IGNORECASE)
# Exceptions that a retry cannot avoid.
_PERMANENT = {
    "AssertionError", "AttributeError", "FileNotFoundError", "HFValidationError", "ImportError", "JSONDecodeError",
    "KeyError", "ModuleNotFoundError", "NotADirectoryError", "NotImplementedError", "OSError",
    "RepositoryNotFoundError", "TypeError", "ValidationError", "ValueError",
}  # fmt: skip


def misconfigured(error: Exception) -> EngineDied:
    """The error if vLLM's configuration could not be created: permanent, unless the network failed."""
    cause = f"{type(error).__name__}: {error}"
    kind = EngineDied if _NETWORK.search(cause) else EngineMisconfigured
    return kind(_message(cause))


def failure(error: Exception, output: Output) -> EngineDied:
    """The error for a failed start, with its cause, which may be in another process, and whether a retry can help."""
    cause = f"{type(error).__name__}: {error}"
    if is_consequence(str(error)):
        cause = output.cause() or cause
    permanent = cause.partition(":")[0] in _PERMANENT and not _TEMPORARY.search(cause)
    kind = EngineMisconfigured if permanent else EngineDied
    return kind(_message(cause))


def _message(cause: str) -> str:
    return f"vLLM could not start: {shorten(' '.join(cause.split()), _MAX_CAUSE)}"


def require_model(model: str) -> None:
    """Raises EngineMisconfigured for a path without a model. vLLM would try to download it."""
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().exists():
        raise EngineMisconfigured(f"There is no model at {model}: give an existing folder or a model's name.")
