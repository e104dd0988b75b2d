"""Calls that wait in engines' queues, and that a router may move to other engines (waiting.lua)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rsm.broker.protocol.codec import number, text


class WaitingCall(NamedTuple):
    """A waiting call. `reuse`: tokens of its prompt that should be in its engine's cache, estimated when it was
    assigned. `moves`: how often it was stolen before."""

    id: str
    gen: str
    engine: str
    session: str
    model: str
    priority: int
    level: int
    prompt_tokens: int
    reuse: int = 0
    moves: int = 0


class Waiting(NamedTuple):
    """`reserved`: idle engines that are reserved for a suspect of poison. `calls`: in the order of each queue."""

    reserved: frozenset[str]
    calls: list[WaitingCall]


def read_waiting(reply: Sequence[Any]) -> Waiting:
    """Reads the script's reply."""
    reserved, rows = reply
    return Waiting(frozenset(map(text, reserved)), [_call(row) for row in rows])


def _call(row: Sequence[bytes]) -> WaitingCall:
    call_id, gen, engine, session, model = map(text, row[:5])
    priority, level, prompt_tokens, reuse = map(number, row[5:9])
    moves = len(row[9].split())
    return WaitingCall(call_id, gen, engine, session, model, priority, level, prompt_tokens, reuse, moves)
