"""Resumes a streamed OpenAI call on another server, from the chunks that its earlier attempts have published.

The published text is sent as the beginning of the answer: after the prompt of `completions`, and in a chat as a last
message for the server to continue (vLLM's `continue_final_message`). The new stream is then adapted so that it looks
like the rest of the first one. A stop string that began in the published text and ends in the new one is not found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rsm.workers.backends.base import CallRejected
from rsm.workers.backends.openai.wire import Assembler

CANNOT_RESUME = (
    "The remote server died during this stream, which cannot be resumed. Submit the call again, with "
    'on_engine_loss="restart" if a lost stream should start over.'
)
# A grammar would start over; the others add output that cannot be resumed.
_NOT_RESUMABLE = ("response_format", "structured_outputs", "logprobs", "prompt_logprobs", "echo", "suffix")
_PLAIN = {"role", "content"}


class Transcript:
    """The published part of one streamed call, over all of its attempts.

    Attributes:
        tokens: chunks with text, nearly always one token each.
        chunks: chunks published by earlier attempts.
    """

    def __init__(self, published: Iterable[str] = ()) -> None:
        self.assembler = Assembler()
        self.tokens = 0
        self.chunks = 0
        for chunk in published:
            self.add(json.loads(chunk))
            self.chunks += 1

    @property
    def text(self) -> str:
        return self.assembler.text

    def add(self, doc: dict[str, Any]) -> bool:
        """Adds one chunk. True if it has new text."""
        before = len(self.text)
        self.assembler.add(doc)
        grew = len(self.text) > before
        self.tokens += grew
        return grew

    def resumable(self, kind: str, body: dict[str, Any], chats: bool) -> bool:
        """Whether a server can resume from here. `chats`: it supports `continue_final_message`."""
        parts = self.assembler.parts()
        if not parts - {"role"}:
            return True
        if body.get("n", 1) not in (None, 1) or any(body.get(name) for name in _NOT_RESUMABLE):
            return False
        if kind != "chat.completions":
            return kind == "completions" and isinstance(body.get("prompt"), str)
        return chats and not parts - _PLAIN and _turns(body) is not None

    def resumed(self, kind: str, body: dict[str, Any], chats: bool) -> dict[str, Any]:
        """The body of a request for the rest.

        Raises:
            CallRejected: the call cannot be resumed.
        """
        if not self.resumable(kind, body, chats):
            raise CallRejected(CANNOT_RESUME)
        if not self.tokens:
            return body
        limits = {
            k: v - self.tokens for k in ("max_tokens", "max_completion_tokens") if isinstance(v := body.get(k), int)
        }
        if kind == "completions":
            return {**body, **limits, "prompt": body["prompt"] + self.text}
        turns = [*(_turns(body) or ()), {"role": "assistant", "content": self._prefix(body) + self.text}]
        return {**body, **limits, "messages": turns, "continue_final_message": True, "add_generation_prompt": False}

    def _prefix(self, body: dict[str, Any]) -> str:
        """The beginning of the answer that the caller itself gave."""
        return str(body["messages"][-1]["content"]) if body.get("continue_final_message") else ""

    def adapt(self, doc: dict[str, Any]) -> dict[str, Any] | None:
        """Adapts a chunk of a later attempt to the stream's first attempt; None if it was published before."""
        if not self.chunks:
            return doc
        adapted = {**doc, **{k: v for k, v in self.assembler.head.items() if k in ("id", "created", "model")}}
        for choice in adapted.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.pop("role", None) and not any(delta.values()) and not choice.get("finish_reason"):
                return None
        return adapted


def _turns(body: dict[str, Any]) -> list[Any] | None:
    """The messages before the assistant's answer; None if the answer cannot be resumed."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return None
    if not body.get("continue_final_message"):
        return messages
    last = messages[-1]
    return messages[:-1] if isinstance(last, dict) and isinstance(last.get("content"), str) else None
