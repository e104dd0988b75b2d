"""The engine process. `EngineConfig` says what it runs; a service unit of your own is a `ServiceUnit` over `Used`.

The names are imported when they are first used: vLLM's own processes come by here, and need none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsm.workers.config import EngineConfig
    from rsm.workers.scheduling.service import ServiceUnit, Used

__all__ = ["EngineConfig", "ServiceUnit", "Used"]

_HOMES = {"EngineConfig": "rsm.workers.config"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "rsm.workers.scheduling.service")), name)
