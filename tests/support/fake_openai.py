"""A small OpenAI-compatible server on 127.0.0.1, over a real socket.

Tests have no real remote server. This one can fail in the ways that matter to a client. Its replies have the form of
those of vLLM's server and of OpenAI.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

WORDS = [f" w{n}" for n in range(100)]


class Server:
    """A fake OpenAI-compatible server. It answers " w0", " w1", … and continues the words that the prompt ends with.

    Attributes:
        fail: status and body for the next calls, instead of an answer.
        cut_after: break the connection after this many chunks.
        stall_after: send nothing more after this many chunks, until the client disconnects.
        pause_s: pause before each chunk.
        in_stream: sent instead of the last chunk.
        byte_by_byte: send single bytes.
        vllm: claim to be vLLM, and send token ids if return_token_ids is set.
        health: status of GET /models.
        models: what GET /models lists.
        about: answers to requests outside OpenAI's API, by path.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.fail: tuple[int, bytes] | None = None
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.in_stream: dict[str, Any] | None = None
        self.pause_s = 0.0
        self.byte_by_byte = False
        self.vllm = False
        self.health = 200
        self.models = ["the-model"]
        self.about: dict[str, str] = {}
        self.hung_up = asyncio.Event()
        self.url = ""
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            await self._answer(head[0].split()[1], headers, body, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.hung_up.set()
        finally:
            writer.close()

    async def _answer(
        self, path: str, headers: dict[str, str], body: bytes, reader: asyncio.StreamReader, w: asyncio.StreamWriter
    ) -> None:
        if path == "/v1/models":
            owner = "vllm" if self.vllm else "somebody"
            listed = [{"id": name, "owned_by": owner} for name in self.models]
            return await self._send(w, self.health, json.dumps({"data": listed}))
        if path in self.about:
            return await self._send(w, 200, self.about[path])
        if not path.startswith("/v1/"):
            return await self._send(w, 404, "")
        request = json.loads(body)
        self.requests.append(request | {"path": path})
        self.headers.append(headers)
        if self.fail is not None:
            return await self._send(w, *self.fail)
        if path == "/v1/embeddings":
            vectors = [{"index": 0, "embedding": [0.5]}]
            return await self._send(w, 200, json.dumps({"data": vectors, "usage": {"prompt_tokens": 3}}))
        if request["stream"]:
            return await self._stream(path, request, reader, w)
        return await self._send(w, 200, json.dumps(self.whole(path, request)))

    async def _send(self, w: asyncio.StreamWriter, status: int, body: str | bytes) -> None:
        data = body if isinstance(body, bytes) else body.encode()
        w.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(data), data))
        await w.drain()

    async def _stream(
        self, path: str, request: dict[str, Any], reader: asyncio.StreamReader, w: asyncio.StreamWriter
    ) -> None:
        w.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n")
        w.write(b"Transfer-Encoding: chunked\r\n\r\n")
        await self._write(w, b": a comment\n\n")
        for n, doc in enumerate(self._chunks(path, request)):
            await asyncio.sleep(self.pause_s)
            if n == self.cut_after:
                return
            if n == self.stall_after:
                await reader.read()
                self.hung_up.set()
                return
            await self._write(w, b"data: %s\r\n\r\n" % json.dumps(doc, ensure_ascii=False).encode())
        await self._write(w, b"data: [DONE]\n\n")
        w.write(b"0\r\n\r\n")
        await w.drain()

    async def _write(self, w: asyncio.StreamWriter, data: bytes) -> None:
        for part in (data[i : i + 1] for i in range(len(data))) if self.byte_by_byte else (data,):
            w.write(b"%x\r\n%s\r\n" % (len(part), part))
            await w.drain()

    def _chunks(self, path: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        chat, first, limit = path.endswith("chat/completions"), _words_in(_prefix(request)), request["max_tokens"]
        docs = [_chunk(chat, {"delta": {"role": "assistant", "content": ""}})] if chat else []
        for n in range(first, first + limit):
            content: dict[str, Any] = {"delta": {"content": WORDS[n]}} if chat else {"text": WORDS[n]}
            if request.get("return_token_ids"):
                content["token_ids"] = [1000 + n]
            docs.append(_chunk(chat, content, "length" if n == first + limit - 1 else None))
        if self.in_stream is not None:
            docs[-1] = self.in_stream
        if request.get("stream_options", {}).get("include_usage"):
            docs.append({"id": "x", "choices": [], "usage": _usage(request, limit)})
        return docs

    def whole(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        text = "".join(WORDS[: request["max_tokens"]])
        chat = path.endswith("chat/completions")
        content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": "length"}
        return {"id": "x", "choices": [choice], "usage": _usage(request, request["max_tokens"])}


def _chunk(chat: bool, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {"id": "x", "object": kind, "choices": [{"index": 0, **content, "finish_reason": reason}]}


def _prefix(request: dict[str, Any]) -> Any:
    """What may end with words of the answer: the prompt, or the message to continue."""
    if request.get("continue_final_message"):
        return request["messages"][-1]["content"]
    return request.get("prompt")


def _words_in(prompt: Any) -> int:
    """How many words of the answer the prompt holds."""
    if isinstance(prompt, list):
        return sum(1000 <= token < 1100 for token in prompt)
    return str(prompt).count(" w")


def _usage(request: dict[str, Any], produced: int) -> dict[str, Any]:
    prompt = 5 + _words_in(_prefix(request))
    return {"prompt_tokens": prompt, "completion_tokens": produced, "prompt_tokens_details": {"cached_tokens": 4}}
