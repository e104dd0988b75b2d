"""Baseline: strict affinity. A session always goes to the same engine while that engine takes calls."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rsm.broker.protocol.snapshot import EngineView, SessionView
from rsm.router.policies.base import Policy
from rsm.router.views import CallView, Choice


class SessionHash(Policy):
    """Rendezvous hashing (Thaler and Ravishankar, 1998): if an engine leaves, only its own sessions move."""

    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        return Choice(max((e.id for e in engines), key=lambda e: _weight(call.session, e)), "hash of the session")


def _weight(session: str, engine: str) -> bytes:
    return hashlib.blake2b(f"{session}|{engine}".encode(), digest_size=8).digest()
