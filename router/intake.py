"""Turns an entry of the router stream into a checked call, or into a rejection that says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsm.broker.client.request import check_body, check_request, check_size, estimate_tokens
from rsm.broker.errors import InvalidRequest
from rsm.broker.protocol import codec
from rsm.broker.protocol.codec import number, text
from rsm.broker.protocol.ids import check_id, check_model, is_id, shorten
from rsm.broker.protocol.messages import RawCall, Rejection
from rsm.broker.protocol.models import KINDS, MAX_PROMPT_TOKENS, ErrorCode
from rsm.broker.protocol.rules import LAST_TIER
from rsm.router.views import CallView

Fields = Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call to place. `gen`: empty for a first arrival. `raw`: set if a bare XADD pushed it; it has no record yet."""

    entry: str
    call_id: str
    gen: str
    view: CallView
    raw: RawCall | None = None


def read_entry(entry: str, fields: Fields, max_body_bytes: int) -> Arrival | Rejection:
    """Checks one entry. Never raises, so that a bad entry does not block those after it."""
    try:
        if fields.get(b"ref") == b"1" or b"gen" in fields:
            return _read_reference(entry, fields)
        return _read_raw(entry, fields, max_body_bytes)
    except InvalidRequest as e:
        return reject(entry, fields, ErrorCode.INVALID_REQUEST, str(e))


def reject(entry: str, fields: Fields, code: ErrorCode, message: str) -> Rejection:
    """A rejection with the valid ones of the entry's ids, so that its producer is notified."""

    def usable(name: bytes, default: str) -> str:
        value = text(fields.get(name))
        return value if is_id(value) else default

    given = b"id" in fields
    call_id = usable(b"id", "" if given else entry)
    session, inbox = usable(b"session", call_id), usable(b"inbox", "")
    return Rejection(entry, call_id, text(fields.get(b"gen")), session, inbox, code.value, message)


def _read_reference(entry: str, fields: Fields) -> Arrival:
    """Reads an entry with a record: pushed by `Client.submit`, or given back to the router."""
    call_id = check_id(text(fields.get(b"id")), "id")
    session = check_id(text(fields.get(b"session")) or call_id, "session")
    model = text(fields.get(b"model"))
    tokens = min(max(0, _whole(fields, b"prompt_tokens", 0)), MAX_PROMPT_TOKENS)  # more would overflow a counter
    priority = min(max(-128, _whole(fields, b"priority", 0)), 127)
    level = min(max(0, _whole(fields, b"level", 0)), LAST_TIER) if b"level" in fields else None
    view = CallView(session, check_model(model) if model else "", tokens, priority=priority, level=level)
    return Arrival(entry, call_id, text(fields.get(b"gen")), view)


def _read_raw(entry: str, fields: Fields, max_body_bytes: int) -> Arrival:
    """Reads an entry of a bare XADD: routing fields as plain text, the body as `json` or as `body` (msgpack)."""
    call_id = check_id(text(fields[b"id"]), "id") if b"id" in fields else entry
    kind = text(fields.get(b"kind")) or "generate"
    if kind not in KINDS:
        raise InvalidRequest(f"kind must be one of {', '.join(KINDS)}; got {shorten(kind)!r}.")
    field, data = _body(fields)
    check_size(len(data), max_body_bytes)
    body = codec.decode(data, field)
    check_body(kind, body)
    model = text(fields.get(b"model"))
    request = check_request(
        id=call_id,
        session=text(fields.get(b"session")) or call_id,
        kind=kind,
        model=model,
        priority=_whole(fields, b"priority", 0),
        deadline_ms=_deadline_ms(entry, fields),
        stream=text(fields.get(b"stream")) == "1",
        inbox=text(fields.get(b"inbox")),
        prompt_tokens=_whole(fields, b"prompt_tokens", 0) or estimate_tokens(body, len(data)),
        traceparent=text(fields.get(b"traceparent")),
        on_engine_loss=text(fields.get(b"on_engine_loss")) or "continue",
        parent_session=text(fields.get(b"parent_session")),
    )
    raw = RawCall(entry, request, codec.digest(request.kind, request.model, data), field)
    view = CallView(request.session, request.model, request.prompt_tokens, priority=request.priority)
    return Arrival(entry, call_id, "", view, raw)


def _deadline_ms(entry: str, fields: Fields) -> int | None:
    """From an absolute `deadline_ms`, or from a `timeout_ms` since the push."""
    deadline: int | None = _whole(fields, b"deadline_ms", None)
    timeout: int | None = _whole(fields, b"timeout_ms", None)
    if deadline is not None and timeout is not None:
        raise InvalidRequest("Give either timeout_ms (from the push) or deadline_ms (epoch milliseconds), not both.")
    return deadline if timeout is None else number(entry.partition("-")[0]) + max(0, timeout)


def _body(fields: Fields) -> tuple[codec.Format, bytes]:
    as_json, as_msgpack = fields.get(b"json"), fields.get(b"body")
    if (as_json is None) == (as_msgpack is None):
        found = "neither" if as_json is None else "both"
        raise InvalidRequest(f'An entry needs exactly one of "json" (text) and "body" (msgpack); it has {found}.')
    return ("json", as_json) if as_json is not None else ("body", as_msgpack or b"")


def _whole(fields: Fields, name: bytes, default: Any) -> Any:
    value = text(fields.get(name))
    if not value:
        return default
    try:
        return int(value)
    except ValueError:
        raise InvalidRequest(f"{name.decode()} must be a whole number; got {shorten(value)!r}.") from None
