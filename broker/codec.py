"""Bodies and results as bytes: msgpack, or JSON where the producer pushed JSON. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import msgpack

from broker.errors import InvalidRequest

# A record keeps its body under the name of its format, so the result can be written in the same one:
# who pushes JSON with redis-cli reads JSON with redis-cli.
Format = Literal["json", "body"]


def encode(value: dict[str, Any], fmt: Format = "body") -> bytes:
    """A body or result as bytes.

    Raises:
        InvalidRequest: it holds something that the format cannot express.
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
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as e:
        name = "JSON" if fmt == "json" else "msgpack"
        raise InvalidRequest(f"The body is not valid {name} ({type(e).__name__}).") from e
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise InvalidRequest('The body must be a map with text keys, such as {"prompt": "hi"}.')
    return value


def _loads(data: bytes) -> Any:
    value = json.loads(data)
    if b"\\u" in data:  # an escaped lone surrogate is text in JSON alone: nothing behind here could write it
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unpack(data: bytes) -> Any:
    # Inner maps may have any keys: logit_bias has token ids.
    return msgpack.unpackb(data, ext_hook=_no_extensions, strict_map_key=False)


def _no_extensions(code: int, data: bytes) -> Any:
    raise ValueError("msgpack extension types are not accepted")


def digest(kind: str, model: str, data: bytes) -> str:
    """Tells a repeated push of a call from another call under the same id."""
    hashed = hashlib.blake2b(f"{kind}|{model}|".encode(), digest_size=16)
    hashed.update(data)
    return hashed.hexdigest()


def text(raw: bytes | str | None) -> str:
    """A Redis reply as text, "" for a missing one."""
    if raw is None:
        return ""
    return raw if isinstance(raw, str) else raw.decode("utf-8", "replace")


def number(raw: bytes | str | None, default: int = 0) -> int:
    """A Redis reply as a whole number, `default` for a missing or empty one."""
    return int(float(raw)) if raw else default
