"""A routing policy in a package of its own: `RSM_POLICY=bounded_hash:BoundedHash`.

Hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018): a session goes to the engine that its hash names,
unless that engine has more than its share of the calls; then to the next one in an order that is the session's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rsm.router import CallView, Choice, EngineView, Policy, SessionView

# How much more than the mean an engine may hold, as a factor.
BOUND = 1.25


class BoundedHash(Policy):
    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        # This call counts, too, so at least one engine is within the bound.
        most = BOUND * (sum(map(_calls, engines)) + 1) / len(engines)
        order = sorted(engines, key=lambda e: _weight(call.session, e.id), reverse=True)
        engine = next(e for e in order if _calls(e) < most)
        return Choice(engine.id, "hash of the session" if engine is order[0] else f"{order[0].id} has its share")


def _calls(engine: EngineView) -> int:
    return engine.queued + engine.running


def _weight(session: str, engine: str) -> bytes:
    return hashlib.blake2b(f"{session}|{engine}".encode(), digest_size=8).digest()
