"""The wire of an OpenAI-compatible server: event streams, chunks put together, errors read. Nothing here does I/O."""

from __future__ import annotations

import json
import re
from typing import Any

from workers.backend import CallRejected, EngineError

# A carriage return at the very end may be half of a CRLF: it waits for the next network chunk.
_END_OF_LINE = re.compile(rb"\r\n|\n|\r(?=.)", re.DOTALL)
_RETRY_ELSEWHERE = frozenset({401, 408, 429})
_ONCE = frozenset({"role", "id", "type", "name"})  # of a delta's texts, those that are not pieces of a longer one
_MAX_MESSAGE = 500


class SseParser:
    """Server-sent events out of bytes, however the network cut them. Only `data` matters; comments are skipped.

    Lines end as the standard says: not at the Unicode separators that JSON texts may hold.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[str]:
        """The data of each event that is now complete."""
        *lines, self._rest = _END_OF_LINE.split(self._rest + data)
        return [event for line in lines if (event := self._line(line)) is not None]

    def close(self) -> list[str]:
        """What is left when the connection ends: some servers leave out the last empty line."""
        events = self.feed(b"\n\n") if self._rest or self._data else []
        self._rest = b""
        return events

    def _line(self, line: bytes) -> str | None:
        line = line.removesuffix(b"\r")
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        event, self._data = b"\n".join(self._data), []
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
    except (ValueError, RecursionError) as e:
        raise EngineError("The server sent something that is not JSON.") from e
    if not isinstance(value, dict):
        raise EngineError("The server sent something that is not a JSON object.")
    return value


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
    def finished(self) -> bool:
        """All choices seen so far have ended."""
        return bool(self._choices) and all(c.get("finish_reason") for c in self._choices.values())

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return choice_text(self._choices.get(0, {}))

    @property
    def finish_reason(self) -> str:
        return self._choices.get(0, {}).get("finish_reason") or "stop"

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
    return choice.get("text") or (choice.get("message") or {}).get("content") or ""
