"""One HTTP request to an ASGI application in this process, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

Message = MutableMapping[str, Any]


async def post(
    app: Any,
    path: str,
    body: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    on_start: Callable[[int, dict[bytes, bytes]], None],
    on_body: Callable[[bytes], None],
    disconnected: asyncio.Event,
) -> None:
    """Runs the request to its end.

    Never cancel it, because vLLM would keep running the request in its engine. Set `disconnected` instead, which acts
    like the disconnect of an HTTP client.

    Args:
        on_start: gets the status and headers of the response.
        on_body: gets each part of the response as it is sent.
    """
    body_sent = False

    async def receive() -> Message:
        nonlocal body_sent
        if not body_sent:
            body_sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            on_start(message["status"], dict(message.get("headers", ())))
        elif message["type"] == "http.response.body" and message.get("body"):
            on_body(message["body"])

    await app(_scope(path, len(body), headers), receive, send)


def _scope(path: str, size: int, headers: Sequence[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "client": None,
        "server": None,
        "state": {},
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(size).encode()),
            *headers,
        ],
    }
