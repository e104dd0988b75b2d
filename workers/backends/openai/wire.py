"""The wire of an OpenAI-compatible server: event streams, chunks put together, errors read. Nothing here does I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rsm.workers.backends.base import CallRejected, EngineError

# A carriage return at the very end may be half of a CRLF: it waits for the next network chunk.
_END_OF_LINE = re.compile(rb"\r\n|\n|\r(?=.)", re.DOTALL)
_RETRY_ELSEWHERE = frozenset({401, 408, 429})
_ONCE = frozenset({"role", "id", "type", "name"})  # of a delta's texts, those that are not pieces of a longer one
_MAX_MESSAGE = 500


# An event, or a whole body, that is larger comes from no sound server.
MAX_BYTES = 64 << 20


class SseParser:
    """Server-sent events out of bytes, however the network cut them. Only `data` matters; comments are skipped.

    Lines end as the standard says: not at the Unicode separators that JSON texts may hold.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest: list[bytes] = []  # of a line that has not ended; joined once, or a long one would cost its square
        self._data: list[bytes] = []
        self._held = 0  # bytes in both

    def feed(self, data: bytes) -> list[str]:
        """The data of each event that is now complete.

        Raises:
            EngineError: an event grows beyond all bounds.
        """
        if not data:
            return []
        ends_here = b"\n" in data or b"\r" in data or (self._rest and self._rest[-1].endswith(b"\r"))
        self._rest.append(data)
        self._held += len(data)
        events: list[str] = []
        if ends_here:
            *lines, rest = _END_OF_LINE.split(b"".join(self._rest))
            self._held -= sum(map(len, self._rest))
            self._rest = [rest] if rest else []
            events = [event for line in lines if (event := self._line(line)) is not None]
            self._held += len(rest)
        if self._held > self._max_bytes:
            raise EngineError("The server sent an event that does not end.")
        return events

    def close(self) -> list[str]:
        """What is left when the connection ends: some servers leave out the last empty line."""
        events = self.feed(b"\n\n") if self._rest or self._data else []
        self._rest, self._held = [], 0
        return events

    def _line(self, line: bytes) -> str | None:
        line = line.removesuffix(b"\r")
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._held += len(value)
            return None
        event, self._data = b"\n".join(self._data), []
        self._held = 0
        return event.decode("utf-8", "replace") if event else None


def single_line(data: str) -> str:
    """A JSON document without line breaks, so that it can be sent on as one line.

    Raises:
        EngineError: it is not JSON.
    """
    return json.dumps(document(data), separators=(",", ":")) if "\n" in data or "\r" in data else data


def document(data: str | bytes) -> dict[str, Any]:
    """A JSON object that the server sent.

    Raises:
        EngineError: it is none.
    """
    try:
        value = json.loads(data)
        if (b"\\u" if isinstance(data, bytes) else "\\u") in data:  # type: ignore[operator]
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is text that Redis could not be sent
    except (ValueError, RecursionError) as e:
        raise EngineError("The server sent something that is not JSON.") from e
    if not isinstance(value, dict):
        raise EngineError("The server sent something that is not a JSON object.")
    return value


@contextmanager
def readable() -> Iterator[None]:
    """Around whatever takes a server's documents apart.

    Raises:
        EngineError: a document is of another shape than OpenAI's API says.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as e:
        raise EngineError(f"The server sent something of another shape ({type(e).__name__}).") from None


def error(status: int, body: str | bytes, secret: str = "") -> CallRejected | EngineError:
    """What an HTTP status other than 200 means for the call. `secret` is kept out of the message.

    A bad key, a timeout and a rate limit are not the call's fault: it may run elsewhere, or later.
    """
    said = f"The server answered {status}: {_message(body)}"
    said = said.replace(secret, "***") if secret else said
    return CallRejected(said) if 400 <= status < 500 and status not in _RETRY_ELSEWHERE else EngineError(said)


def error_inside(doc: dict[str, Any], secret: str = "") -> CallRejected | EngineError | None:
    """The error that a server sends in a stream that had begun with status 200."""
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
        return text[:_MAX_MESSAGE].strip() or "(nothing)"
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return (value if isinstance(value, str) else json.dumps(value))[:_MAX_MESSAGE]


class Assembler:
    """Puts the chunks of a stream together into the body that the call would have had without streaming."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    @property
    def head(self) -> dict[str, Any]:
        """What all chunks have in common: id, model, time of creation."""
        return self._head

    def parts(self) -> set[str]:
        """What the choices hold so far: role, text or content, tool calls, reasoning."""
        choices = self._choices.values()
        held = [*(c.get("message") or {} for c in choices), *({"text": c.get("text")} for c in choices)]
        return {name for part in held for name, value in part.items() if value}

    @property
    def finished(self) -> bool:
        """All choices seen so far have ended."""
        return bool(self._choices) and all(c.get("finish_reason") for c in self._choices.values())

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return choice_text(self._choices.get(0, {}))

    @property
    def finish_reason(self) -> str:
        return str(self._choices.get(0, {}).get("finish_reason") or "stop")

    def add(self, chunk: dict[str, Any]) -> None:
        """Takes in one chunk."""
        self._head = self._head or {k: v for k, v in chunk.items() if k not in ("choices", "usage")}
        for choice in chunk.get("choices") or ():
            index = choice.get("index", 0)
            part = {"message" if k == "delta" else k: v for k, v in choice.items()}
            merge(self._choices.setdefault(index, {"index": index}), part)

    def response(self, usage: dict[str, Any] | None, reason: str = "") -> dict[str, Any]:
        """The whole body. `reason`: why a choice that has not finished ends all the same."""
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
    """The text of a choice of either kind, "" if it has none."""
    text = choice.get("text") or (choice.get("message") or {}).get("content")
    return text if isinstance(text, str) else ""
