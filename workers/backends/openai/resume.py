"""Going on with a streamed OpenAI call on another server, from the chunks that its earlier attempts have published.

What was said is sent along as the beginning of the answer: behind the prompt of `completions`, and in a chat as a last
message that the server is to go on with (vLLM's `continue_final_message`). The stream that comes back is then made to
look like the rest of the first one. A stop string that began in there and ends in here is not seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rsm.workers.backends.base import CallRejected
from rsm.workers.backends.openai.wire import Assembler

CANNOT_CONTINUE = (
    "The remote server died in the middle of this stream and it cannot be continued; "
    'submit the call again, with on_engine_loss="restart" if it is to begin anew by itself.'
)
# A grammar would begin anew; what these add to what was said already is lost.
_BEGINS_ANEW = ("response_format", "structured_outputs", "logprobs", "prompt_logprobs", "echo", "suffix")
_PLAIN = {"role", "content"}


class Said:
    """What is out of one streamed call so far, over all its attempts.

    Attributes:
        tokens: chunks with text, nearly always one token each.
        chunks: chunks published by earlier attempts.
    """

    def __init__(self, published: Iterable[str] = ()) -> None:
        self.assembler = Assembler()
        self.tokens = 0
        self.chunks = 0
        for chunk in published:
            self.take(json.loads(chunk))
            self.chunks += 1

    @property
    def text(self) -> str:
        return self.assembler.text

    def take(self, doc: dict[str, Any]) -> bool:
        """Takes in one chunk; True if it brought text."""
        before = len(self.text)
        self.assembler.add(doc)
        grew = len(self.text) > before
        self.tokens += grew
        return grew

    def continuable(self, kind: str, body: dict[str, Any], chats: bool) -> bool:
        """Whether a server can go on from here. `chats`: it knows `continue_final_message`."""
        parts = self.assembler.parts()
        if not parts - {"role"}:
            return True
        if body.get("n", 1) not in (None, 1) or any(body.get(name) for name in _BEGINS_ANEW):
            return False
        if kind != "chat.completions":
            return kind == "completions" and isinstance(body.get("prompt"), str)
        return chats and not parts - _PLAIN and _turns(body) is not None

    def continued(self, kind: str, body: dict[str, Any], chats: bool) -> dict[str, Any]:
        """The body that asks for the rest.

        Raises:
            CallRejected: nobody can give it.
        """
        if not self.continuable(kind, body, chats):
            raise CallRejected(CANNOT_CONTINUE)
        if not self.tokens:
            return body
        limits = {
            k: v - self.tokens for k in ("max_tokens", "max_completion_tokens") if isinstance(v := body.get(k), int)
        }
        if kind == "completions":
            return {**body, **limits, "prompt": body["prompt"] + self.text}
        turns = [*(_turns(body) or ()), {"role": "assistant", "content": self._begun(body) + self.text}]
        return {**body, **limits, "messages": turns, "continue_final_message": True, "add_generation_prompt": False}

    def _begun(self, body: dict[str, Any]) -> str:
        """What the caller itself had put into the assistant's mouth."""
        return str(body["messages"][-1]["content"]) if body.get("continue_final_message") else ""

    def adapt(self, doc: dict[str, Any]) -> dict[str, Any] | None:
        """A chunk of a later attempt as the next one of the stream that had begun; None: it was there already."""
        if not self.chunks:
            return doc
        adapted = {**doc, **{k: v for k, v in self.assembler.head.items() if k in ("id", "created", "model")}}
        for choice in adapted.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.pop("role", None) and not any(delta.values()) and not choice.get("finish_reason"):
                return None
        return adapted


def _turns(body: dict[str, Any]) -> list[Any] | None:
    """The messages before the assistant's answer; None if they are not such that it can be gone on with."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return None
    if not body.get("continue_final_message"):
        return messages
    last = messages[-1]
    return messages[:-1] if isinstance(last, dict) and isinstance(last.get("content"), str) else None
