"""Where the sessions' KV caches are: affinity hashes in Redis, `{ns}:affinity:SESSION` engine → "tokens:last use"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect_view
from rsm.broker.protocol import codec
from rsm.broker.protocol.ids import check_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.snapshot import SessionView
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings


def best_engine(session: SessionView, available: Sequence[str]) -> str | None:
    """The engine that a session is bound to, else the one with most of its cache; None if no engine has any of it."""
    if session.bound in available:
        return session.bound
    holding = [e for e in available if session.resident.get(e)]
    return max(holding, key=lambda e: session.resident[e]) if holding else None


class KVCacheCoordinator:
    """Reads and writes the affinity metadata, and counts hits. Several can work on one namespace.

    Args:
        cache_token_threshold: prompts up to this many tokens may go to any engine (Autellix, Algorithm 2).
        server: a Redis client with the broker's options. Default: a new one for `settings`.
    """

    def __init__(
        self,
        cache_token_threshold: int | None = None,
        *,
        settings: Settings | None = None,
        server: redis.Redis | None = None,
    ) -> None:
        self._settings = settings or Settings()
        self.cache_token_threshold = (
            self._settings.cache_token_threshold if cache_token_threshold is None else cache_token_threshold
        )
        self._redis = server or connect_view(self._settings)
        self._keys = Keys(self._settings.namespace)
        self._transitions = Transitions(self._keys, self._settings)

    def record_cache_usage(self, session_id: str, engine_id: str, prompt_tokens: int) -> None:
        """Records that `prompt_tokens` of the session are now cached on the engine."""
        session, engine = check_id(session_id, "session"), check_id(engine_id, "engine")
        execute.run(self._redis, self._transitions.cached(session, engine, int(prompt_tokens)))

    def get_best_engine_for_session(
        self, session_id: str, available_engines: Sequence[str], prompt_tokens: int
    ) -> str | None:
        """The engine that has the session's cache; None if the prompt is short, or no engine has the cache."""
        if prompt_tokens <= self.cache_token_threshold:
            return None
        snapshot = execute.run(self._redis, self._transitions.snapshot([check_id(session_id, "session")]))
        engine = best_engine(snapshot.sessions[session_id], available_engines)
        execute.run(self._redis, self._transitions.affinity_asked(engine is not None))
        return engine

    def get_cache_stats(self) -> dict[str, Any]:
        """Totals since the namespace was created: `affinity_hits`, `affinity_misses`, `hit_rate` (of calls with long
        prompts), and `prompt_tokens`, `cached_tokens`, `token_hit_rate` as the engines counted them."""
        names = ["affinity_hits", "affinity_misses", "prompt_tokens", "cached_tokens"]
        stats: dict[str, Any] = {
            name: codec.number(v) for name, v in zip(names, self._redis.hmget(self._keys.stats, names), strict=True)
        }
        stats["hit_rate"] = _share(stats["affinity_hits"], stats["affinity_hits"] + stats["affinity_misses"])
        stats["token_hit_rate"] = _share(stats["cached_tokens"], stats["prompt_tokens"])
        return stats


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
