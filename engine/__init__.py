"""Everything users import."""

from broker import (
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
from broker.lifecycle import RequestLifecycleManager, RequestMetadata
from broker.process_table import GlobalProcessTable, SessionManager
from engine.manager import MultiEngineManager
from engine.process import EngineProcess, LLMRequest
from router.kv_coordinator import KVCacheCoordinator
from workers.config import EngineConfig

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
