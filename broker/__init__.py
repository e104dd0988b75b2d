"""The contract with Redis that producers, routers and workers share. A producer needs only this package.

Example: `Client().submit("Explain quantum computing", max_tokens=64).result().text`
"""

from rsm.broker.client.aio import AsyncClient
from rsm.broker.client.handles import AsyncCall, CallHandle
from rsm.broker.client.sharded import AsyncShardedClient, ShardedClient, namespace_of
from rsm.broker.client.sync import Client
from rsm.broker.errors import (
    AccessDenied,
    BadRecord,
    BrokerUnavailable,
    CallLost,
    Conflict,
    EngineFailed,
    EngineIdTaken,
    EvictingRedis,
    IllegalTransition,
    InvalidRequest,
    NotReplicated,
    Overloaded,
    RsmError,
    UnknownCall,
)
from rsm.broker.protocol.models import (
    CallCancelled,
    CallEnded,
    CallFailed,
    CallRecord,
    CallResult,
    Delta,
    ErrorCode,
    RequestState,
)
from rsm.broker.settings import Settings

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
    "EngineFailed",
    "EngineIdTaken",
    "ErrorCode",
    "EvictingRedis",
    "IllegalTransition",
    "InvalidRequest",
    "NotReplicated",
    "Overloaded",
    "RequestState",
    "RsmError",
    "Settings",
    "ShardedClient",
    "UnknownCall",
    "namespace_of",
]
