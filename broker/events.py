"""Entries of inboxes and call logs, read back: pieces of output, and ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from broker.codec import number, text
from broker.models import CallRecord, Delta

Fields = Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class End:
    """The end of a call. `n`: how many pieces its log holds. `record` is None where the news left the result out."""

    n: int
    record: CallRecord | None


def read_event(call_id: str, fields: Fields, event_id: str) -> Delta | End:
    """One entry of an inbox or a log."""
    if b"state" in fields:
        whole = b"submitted_ms" in fields and not fields.get(b"big")
        return End(number(fields.get(b"n")), CallRecord.from_hash(call_id, fields) if whole else None)
    ids = text(fields.get(b"token_ids"))
    chunks = text(fields.get(b"chunk"))
    return Delta(
        n=number(fields.get(b"n")),
        event_id=event_id,
        text=text(fields.get(b"text")),
        token_ids=[int(i) for i in ids.split()],
        chunks=chunks.split("\n") if chunks else [],
    )
