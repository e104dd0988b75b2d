"""The engine process. `EngineConfig` configures one engine; a custom service unit is a `ServiceUnit` over `Used`.

Names are imported on first use, because vLLM's own processes import this package and need none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsm.workers.config import EngineConfig
    from rsm.workers.scheduling.service import ServiceUnit, Used

__all__ = ["EngineConfig", "ServiceUnit", "Used"]

_MODULES = {"EngineConfig": "rsm.workers.config"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "rsm.workers.scheduling.service")), name)
