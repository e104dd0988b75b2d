"""The public API for users: engines, clients, views and errors."""

from rsm.broker import (
    AsyncClient,
    BrokerUnavailable,
    CallCancelled,
    CallFailed,
    CallRecord,
    CallResult,
    Client,
    Conflict,
    Delta,
    EngineFailed,
    EngineIdTaken,
    ErrorCode,
    IllegalTransition,
    InvalidRequest,
    RequestState,
    RsmError,
    Settings,
    UnknownCall,
)
from rsm.engine.manager import MultiEngineManager
from rsm.engine.process import EngineProcess, LLMRequest
from rsm.engine.seed_api.lifecycle import RequestLifecycleManager, RequestMetadata
from rsm.engine.seed_api.process_table import GlobalProcessTable, SessionManager
from rsm.router.affinity import KVCacheCoordinator
from rsm.workers.config import EngineConfig

__all__ = [
    "AsyncClient",
    "BrokerUnavailable",
    "CallCancelled",
    "CallFailed",
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
    "GlobalProcessTable",
    "IllegalTransition",
    "InvalidRequest",
    "KVCacheCoordinator",
    "LLMRequest",
    "MultiEngineManager",
    "RequestLifecycleManager",
    "RequestMetadata",
    "RequestState",
    "RsmError",
    "SessionManager",
    "Settings",
    "UnknownCall",
]
