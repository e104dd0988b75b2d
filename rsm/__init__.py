"""rsm-engine: a durable, program-aware call broker between LLM agents and vLLM engines, on Redis.

The names below are public. Each is imported on first use, so a producer loads neither the router nor the engines.
Subpackages are `rsm.broker`, `rsm.router`, `rsm.workers`, `rsm.engine` and `rsm.simulation`.

Example: `rsm.Client().submit("Explain quantum computing", max_tokens=64).result().text`
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsm.broker import (
        AccessDenied,
        AsyncCall,
        AsyncClient,
        AsyncShardedClient,
        BadRecord,
        BrokerUnavailable,
        CallCancelled,
        CallEnded,
        CallFailed,
        CallHandle,
        CallLost,
        CallRecord,
        CallResult,
        Client,
        Conflict,
        Delta,
        EngineFailed,
        EngineIdTaken,
        ErrorCode,
        EvictingRedis,
        IllegalTransition,
        InvalidRequest,
        NotReplicated,
        Overloaded,
        RequestState,
        RsmError,
        Settings,
        ShardedClient,
        UnknownCall,
        namespace_of,
    )
    from rsm.engine import EngineConfig, EngineProcess, MultiEngineManager

__all__ = [
    "AccessDenied",
    "AsyncCall",
    "AsyncClient",
    "AsyncShardedClient",
    "BadRecord",
    "BrokerUnavailable",
    "CallCancelled",
    "CallEnded",
    "CallFailed",
    "CallHandle",
    "CallLost",
    "CallRecord",
    "CallResult",
    "Client",
    "Conflict",
    "Delta",
    "EngineConfig",
    "EngineFailed",
    "EngineIdTaken",
    "EngineProcess",
    "ErrorCode",
    "EvictingRedis",
    "IllegalTransition",
    "InvalidRequest",
    "MultiEngineManager",
    "NotReplicated",
    "Overloaded",
    "RequestState",
    "RsmError",
    "Settings",
    "ShardedClient",
    "UnknownCall",
    "namespace_of",
]

_IN_ENGINE = {"EngineConfig", "EngineProcess", "MultiEngineManager"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rsm' has no attribute {name!r}")
    return getattr(import_module("rsm.engine" if name in _IN_ENGINE else "rsm.broker"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
