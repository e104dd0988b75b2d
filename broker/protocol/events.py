"""Reads the entries of inboxes and call logs: chunks of output, and ends."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from rsm.broker.errors import BadRecord
from rsm.broker.protocol.codec import number, text
from rsm.broker.protocol.models import ENDS, CallRecord, Delta

log = logging.getLogger("rsm.client")

Fields = Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class End:
    """The end of a call. `n`: the number of events in its log. `record`: None if the event leaves the result out."""

    n: int
    record: CallRecord | None


def read_event(call_id: str, fields: Fields, event_id: str) -> Delta | End | None:
    """Reads one entry of an inbox or a log. None if it cannot be read, so that a reader skips it."""
    try:
        return _end(call_id, fields) if b"state" in fields else _delta(fields, event_id)
    except (LookupError, ValueError):
        log.warning("call %s: skipped an event that cannot be read", call_id)
        return None


def is_end(fields: Fields) -> bool:
    """Whether an entry of an inbox is the end of its call."""
    return fields.get(b"state") in ENDS and b"call" in fields


def end_record(call_id: str, fields: Fields) -> CallRecord | None:
    """The record in the event of an end; None if the event leaves the result out, or cannot be read."""
    if b"submitted_ms" not in fields or fields.get(b"big"):
        return None
    try:
        return CallRecord.from_hash(call_id, fields)
    except BadRecord:
        return None


def _end(call_id: str, fields: Fields) -> End:
    if fields[b"state"] not in ENDS:
        raise ValueError("not a terminal state")
    return End(number(fields.get(b"n")), end_record(call_id, fields))


def _delta(fields: Fields, event_id: str) -> Delta:
    ids = text(fields.get(b"token_ids"))
    chunks = text(fields.get(b"chunk"))
    return Delta(
        n=int(fields[b"n"]),
        event_id=event_id,
        text=text(fields.get(b"text")),
        token_ids=[int(i) for i in ids.split()],
        chunks=chunks.split("\n") if chunks else [],
        restart=fields.get(b"restart") == b"1",
    )
