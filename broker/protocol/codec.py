"""Encodes bodies and results: msgpack, or JSON if the producer pushed JSON. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import msgpack

from rsm.broker.errors import InvalidRequest

# A record stores its body in a field named after its format, so that the result can have the same format: a producer
# that pushes JSON with redis-cli reads JSON with redis-cli.
Format = Literal["json", "body"]
# The first bytes of a timestamp of 4, 8 or 12 bytes, msgpack's own extension type.
_TIMESTAMPS = (b"\xd6\xff", b"\xd7\xff", b"\xc7\x0c\xff")


def encode(value: dict[str, Any], fmt: Format = "body") -> bytes:
    """Encodes a body or a result.

    Raises:
        InvalidRequest: it contains something that the format cannot express.
    """
    try:
        if fmt == "json":
            return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        packed: bytes = msgpack.packb(value)
        return packed
    except (TypeError, ValueError, OverflowError, RecursionError) as e:
        raise InvalidRequest(f"The body cannot be encoded: {e}. Use text, numbers, lists and maps only.") from e


def decode(data: bytes, fmt: Format = "body") -> dict[str, Any]:
    """The map that `data` encodes.

    Raises:
        InvalidRequest: the bytes are not a map in that format. The message never quotes them.
    """
    try:
        value = _loads(data) if fmt == "json" else _unpack(data)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as e:
        name = "JSON" if fmt == "json" else "msgpack"
        raise InvalidRequest(f"The body is not valid {name} ({type(e).__name__}).") from e
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise InvalidRequest('The body must be a map with text keys, such as {"prompt": "hi"}.')
    return value


def _loads(data: bytes) -> Any:
    value = json.loads(data)
    if b"\\u" in data:  # JSON allows an escaped lone surrogate, but no later encoder could write it
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unpack(data: bytes) -> Any:
    # Inner maps may have any keys: logit_bias has token ids.
    value = msgpack.unpackb(data, ext_hook=_no_extensions, strict_map_key=False, timestamp=3)
    if any(head in data for head in _TIMESTAMPS):  # they bypass the hook and become datetimes, which cannot be packed
        msgpack.packb(value)
    return value


def _no_extensions(code: int, data: bytes) -> Any:
    raise ValueError("msgpack extension types are not accepted")


def digest(kind: str, model: str, data: bytes) -> str:
    """A hash that tells a repeated push of a call from a different call with the same id."""
    hashed = hashlib.blake2b(f"{kind}|{model}|".encode(), digest_size=16)
    hashed.update(data)
    return hashed.hexdigest()


def text(raw: bytes | str | None) -> str:
    """A Redis reply as text; "" if it is missing."""
    if raw is None:
        return ""
    return raw if isinstance(raw, str) else raw.decode("utf-8", "replace")


def number(raw: bytes | str | None, default: int = 0) -> int:
    """A Redis reply as a whole number; `default` if it is missing, empty or not a number."""
    return int(real(raw, default)) if raw else default


def real(raw: bytes | str | None, default: float = 0.0) -> float:
    """A Redis reply as a finite number; `default` if it is missing, empty or not a number."""
    try:
        value = float(raw) if raw else default
    except ValueError:
        return default
    return value if math.isfinite(value) else default


def pairs(reply: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The pairs of a flat list from Redis."""
    return list(zip(reply[::2], reply[1::2], strict=True))
