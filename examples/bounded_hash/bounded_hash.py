"""A routing policy in its own package: `RSM_POLICY=bounded_hash:BoundedHash`.

Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018): a session's hash gives an order of the
engines, and its calls go to the first engine that does not have more than its share of the calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rsm.router import CallView, Choice, EngineView, Policy, SessionView

# The maximum load of an engine, as a factor of the mean load.
BOUND = 1.25


class BoundedHash(Policy):
    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        # This call counts, too, so at least one engine is below the limit.
        most = BOUND * (sum(map(_calls, engines)) + 1) / len(engines)
        order = sorted(engines, key=lambda e: _weight(call.session, e.id), reverse=True)
        engine = next(e for e in order if _calls(e) < most)
        return Choice(engine.id, "hash of the session" if engine is order[0] else f"{order[0].id} has its share")


def _calls(engine: EngineView) -> int:
    return engine.queued + engine.running


def _weight(session: str, engine: str) -> bytes:
    return hashlib.blake2b(f"{session}|{engine}".encode(), digest_size=8).digest()
