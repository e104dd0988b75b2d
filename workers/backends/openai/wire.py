"""The wire format of an OpenAI-compatible server: event streams, assembled chunks, errors. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rsm.workers.backends.base import CallRejected, EngineError

# A carriage return at the end of the data may be half of a CRLF, so it waits for the next data.
_END_OF_LINE = re.compile(rb"\r\n|\n|\r(?=.)", re.DOTALL)
_RETRY_ELSEWHERE = frozenset({401, 408, 429})
_ONCE = frozenset({"role", "id", "type", "name"})  # texts of a delta that are not parts of a longer text
_MAX_MESSAGE = 500


# The limit on the size of an event or a body.
MAX_BYTES = 64 << 20


class SseParser:
    """Parses server-sent events from bytes that may be split anywhere. Reads only `data`; skips comments.

    Lines end as the standard requires, not at the Unicode separators that JSON texts may contain.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest: list[bytes] = []  # parts of an unfinished line; joined only once, to avoid quadratic cost
        self._data: list[bytes] = []
        self._size = 0  # bytes in both

    def feed(self, data: bytes) -> list[str]:
        """Returns the data of each event that is now complete.

        Raises:
            EngineError: an event is too large.
        """
        if not data:
            return []
        ends_here = b"\n" in data or b"\r" in data or (self._rest and self._rest[-1].endswith(b"\r"))
        self._rest.append(data)
        self._size += len(data)
        events: list[str] = []
        if ends_here:
            *lines, rest = _END_OF_LINE.split(b"".join(self._rest))
            self._size -= sum(map(len, self._rest))
            self._rest = [rest] if rest else []
            events = [event for line in lines if (event := self._line(line)) is not None]
            self._size += len(rest)
        if self._size > self._max_bytes:
            raise EngineError(f"The server sent an event of more than {self._max_bytes} bytes.")
        return events

    def close(self) -> list[str]:
        """Returns the last event when the connection ends, because some servers omit the last empty line."""
        events = self.feed(b"\n\n") if self._rest or self._data else []
        self._rest, self._size = [], 0
        return events

    def _line(self, line: bytes) -> str | None:
        line = line.removesuffix(b"\r")
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._size += len(value)
            return None
        event, self._data = b"\n".join(self._data), []
        self._size = 0
        return event.decode("utf-8", "replace") if event else None


def single_line(data: str) -> str:
    """Returns a JSON document without line breaks, so that it can be forwarded as one line.

    Raises:
        EngineError: it is not JSON.
    """
    return json.dumps(document(data), separators=(",", ":")) if "\n" in data or "\r" in data else data


def document(data: str | bytes) -> dict[str, Any]:
    """Parses a JSON object from the server.

    Raises:
        EngineError: it is not a JSON object.
    """
    try:
        value = json.loads(data)
        if (b"\\u" if isinstance(data, bytes) else "\\u") in data:  # type: ignore[operator]
            json.dumps(value, ensure_ascii=False).encode()  # fails on a lone surrogate, which cannot be sent to Redis
    except (ValueError, RecursionError) as e:
        raise EngineError("The server sent something that is not JSON.") from e
    if not isinstance(value, dict):
        raise EngineError("The server sent something that is not a JSON object.")
    return value


@contextmanager
def readable() -> Iterator[None]:
    """Wraps code that reads a server's documents.

    Raises:
        EngineError: a document does not have the format of OpenAI's API.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as e:
        raise EngineError(f"The server sent a document in an unexpected format ({type(e).__name__}).") from None


def error(status: int, body: str | bytes, secret: str = "") -> CallRejected | EngineError:
    """The error for an HTTP status other than 200. `secret` is removed from the message.

    A wrong key, a timeout and a rate limit are not the call's fault: it may run on another server, or later.
    """
    message = f"The server answered {status}: {_message(body)}"
    message = message.replace(secret, "***") if secret else message
    return CallRejected(message) if 400 <= status < 500 and status not in _RETRY_ELSEWHERE else EngineError(message)


def error_inside(doc: dict[str, Any], secret: str = "") -> CallRejected | EngineError | None:
    """The error inside a stream that began with status 200; None if the document is no error."""
    inner = doc.get("error") or (doc if doc.get("object") == "error" else None)
    if not inner:
        return None
    code = inner.get("code") if isinstance(inner, dict) else None
    return error(code if isinstance(code, int) else 500, json.dumps(doc), secret)


def _message(body: str | bytes) -> str:
    text = body if isinstance(body, str) else body.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text[:_MAX_MESSAGE].strip() or "(empty body)"
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return (value if isinstance(value, str) else json.dumps(value))[:_MAX_MESSAGE]


class Assembler:
    """Assembles the chunks of a stream into the body that the call would have without streaming."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    @property
    def head(self) -> dict[str, Any]:
        """The fields common to all chunks: id, model, creation time."""
        return self._head

    def parts(self) -> set[str]:
        """The names of the parts of the choices so far: role, text or content, tool calls, reasoning."""
        choices = self._choices.values()
        found = [*(c.get("message") or {} for c in choices), *({"text": c.get("text")} for c in choices)]
        return {name for part in found for name, value in part.items() if value}

    @property
    def finished(self) -> bool:
        """Whether all choices seen so far have ended."""
        return bool(self._choices) and all(c.get("finish_reason") for c in self._choices.values())

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return choice_text(self._choices.get(0, {}))

    @property
    def finish_reason(self) -> str:
        return str(self._choices.get(0, {}).get("finish_reason") or "stop")

    def add(self, chunk: dict[str, Any]) -> None:
        """Adds one chunk."""
        self._head = self._head or {k: v for k, v in chunk.items() if k not in ("choices", "usage")}
        for choice in chunk.get("choices") or ():
            index = choice.get("index", 0)
            part = {"message" if k == "delta" else k: v for k, v in choice.items()}
            merge(self._choices.setdefault(index, {"index": index}), part)

    def response(self, usage: dict[str, Any] | None, reason: str = "") -> dict[str, Any]:
        """The whole body. `reason`: the finish reason of choices that have not finished."""
        for choice in self._choices.values():
            choice["finish_reason"] = choice.get("finish_reason") or reason or None
        kind = str(self._head.get("object", "")).removesuffix(".chunk")
        choices = [self._choices[index] for index in sorted(self._choices)]
        return {**self._head, "object": kind, "choices": choices, "usage": usage}


def merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Adds a delta: texts are joined, lists continued, tool calls matched by their index."""
    for name, value in part.items():
        before = whole.get(name)
        if value is None or before is None:
            whole[name] = before if value is None else _copied(name, value)
        elif name == "tool_calls":
            _merge_tools(before, value)
        elif isinstance(before, dict) and isinstance(value, dict):
            merge(before, value)
        elif isinstance(before, str) and isinstance(value, str) and name not in _ONCE:
            whole[name] = before + value
        elif isinstance(before, list) and isinstance(value, list):
            before.extend(value)
        else:
            whole[name] = value


def _copied(name: str, value: Any) -> Any:
    if name == "tool_calls":
        tools: list[dict[str, Any]] = []
        _merge_tools(tools, value)
        return tools
    return value


def _merge_tools(whole: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    for part in parts:
        same = next((t for t in whole if t.get("index", 0) == part.get("index", 0)), None)
        if same is None:
            whole.append(part)
        else:
            merge(same, part)


def choice_text(choice: dict[str, Any]) -> str:
    """The text of a choice of either kind; "" if it has none."""
    text = choice.get("text") or (choice.get("message") or {}).get("content")
    return text if isinstance(text, str) else ""
