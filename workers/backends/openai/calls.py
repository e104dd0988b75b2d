"""Calls to an OpenAI-compatible server: the request for a job, and the outcome from the reply."""

from __future__ import annotations

import json
import time
from typing import Any

from rsm.broker.protocol.models import MAX_PROMPT_TOKENS
from rsm.workers.backends.base import CallRejected, Chunk, Job, Outcome, Resumed
from rsm.workers.backends.openai.resume import CANNOT_RESUME, Transcript
from rsm.workers.backends.openai.wire import choice_text, document

_PATHS = {"chat.completions": "/chat/completions", "completions": "/completions", "embeddings": "/embeddings"}
_DEFAULT_MAX_TOKENS = 16  # the default of the completions API
_CHARS_A_TOKEN = 4  # the usual estimate, if the server gives no count


class Exchange:
    """One request and its reply. Each kind of call has a subclass.

    Attributes:
        streams: the server is asked for an event stream.
        complete: earlier attempts have published everything, so no request is needed.
        finished: the answer is complete, even if the connection fails now.
    """

    complete = False

    def __init__(self, job: Job, path: str, body: dict[str, Any], streams: bool) -> None:
        self.path = path
        self.streams = streams
        self.began = time.perf_counter()
        self._size = prompt_size(job.body)
        self._first: float | None = None
        self._usage: dict[str, Any] = {}
        self._body = {**body, "stream": streams} if path != "/embeddings" else body
        if streams:
            self._body["stream_options"] = {**stream_options(body), "include_usage": True}
        else:
            self._body.pop("stream_options", None)

    @property
    def finished(self) -> bool:
        return False

    @property
    def resumable(self) -> bool:
        """Whether another attempt could resume this call."""
        return True

    def content(self) -> bytes:
        """The request's body.

        Raises:
            CallRejected: it has a value that JSON cannot express.
        """
        try:
            return json.dumps(self._body, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as e:
            raise CallRejected(
                "The body has a value that JSON cannot express; use texts, numbers, lists and objects."
            ) from e

    def chunk(self, doc: dict[str, Any], data: str) -> Chunk | None:
        """Adds one event of the stream; returns the chunk to publish."""
        raise NotImplementedError

    def whole(self, data: bytes) -> None:
        """Sets the body of a reply that is not a stream."""
        raise NotImplementedError

    def outcome(self, aborted: bool = False) -> Outcome:
        """The outcome of the call."""
        raise NotImplementedError

    def tokens(self) -> int:
        """Known output tokens of this attempt."""
        return _number(self._usage.get("completion_tokens"))

    def _note(self, doc: dict[str, Any]) -> None:
        self._usage = doc.get("usage") or self._usage

    def _note_first(self) -> None:
        if self._first is None:
            self._first = time.perf_counter()

    def _counts(self, before: int = 0, produced: int = 0) -> tuple[int, int, int]:
        """Prompt tokens, output tokens, and how many of the prompt tokens were cached.

        `before` output tokens were sent as part of the prompt; `produced` were counted here.
        """
        prompt = max(0, _number(self._usage.get("prompt_tokens")) - before) if self._usage else self._size
        output = before + (_number(self._usage.get("completion_tokens")) if self._usage else produced)
        cached = _number((self._usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
        return prompt, output, min(cached, prompt)

    def _ttft_ms(self) -> float | None:
        return None if self._first is None else (self._first - self.began) * 1000


class GenerateExchange(Exchange):
    """`generate`, over /completions. It always streams, so that an aborted call has its partial output.

    An earlier attempt is resumed by appending its text to the prompt. A stop string that began in that text and ends in
    the new one is not found.
    """

    def __init__(self, job: Job, model: str, return_token_ids: bool) -> None:
        prompt = _prompt(job.body)
        params = {k: v for k, v in job.body.items() if k not in ("prompt", "prompt_token_ids") and v is not None}
        if params.get("n", 1) != 1:
            raise CallRejected("n must be 1; submit one call per answer.")
        limit = params.get("max_tokens", _DEFAULT_MAX_TOKENS)
        if not isinstance(limit, int) or limit < 1:
            raise CallRejected("max_tokens must be a whole number, at least 1.")
        before = job.resumed or Resumed("", [], [], 0)
        self._before, self._reason = _published(before)
        self._text = [before.text]
        self._ids = list(before.token_ids)
        self._chunks = 0
        self.complete = bool(self._reason) or self._before >= limit
        if self._before:
            prompt = _resumed(prompt, before, self._before)
        body = {**params, "model": params.get("model") or model, "prompt": prompt, "max_tokens": limit - self._before}
        if return_token_ids:
            body["return_token_ids"] = True
        super().__init__(job, "/completions", body, streams=True)

    @property
    def finished(self) -> bool:
        return bool(self._reason)

    def chunk(self, doc: dict[str, Any], data: str) -> Chunk | None:
        self._note(doc)
        choice: dict[str, Any] = next(iter(doc.get("choices") or ()), {})
        text, ids, reason = choice.get("text") or "", choice.get("token_ids") or [], choice.get("finish_reason") or ""
        if not (text or ids or reason):
            return None
        if not (isinstance(text, str) and isinstance(reason, str) and all(type(i) is int for i in ids)):
            raise TypeError("a field of a choice has the wrong type")
        self._note_first()
        self._reason = reason or self._reason
        self._chunks += bool(text or ids)
        self._text.append(text)
        self._ids += ids
        return Chunk(text, ids, replay=f"{self._produced()} {reason}".rstrip())

    def outcome(self, aborted: bool = False) -> Outcome:
        reason = self._reason or ("abort" if aborted else "length")
        counts = self._counts(self._before, self._produced() - self._before)
        return Outcome(reason, "".join(self._text), self._ids, *counts, self._ttft_ms())

    def tokens(self) -> int:
        return super().tokens() or self._produced() - self._before

    def _produced(self) -> int:
        """Output tokens so far. Without ids a chunk counts as one token, which is nearly always right."""
        return max(len(self._ids), self._before + self._chunks)


class OpenAIExchange(Exchange):
    """An OpenAI kind, forwarded unchanged."""

    def __init__(self, job: Job, model: str, chats: bool) -> None:
        body = {**job.body, "model": job.body.get("model") or model}
        self._kind, self._asked, self._chats = job.kind, body, chats
        self._transcript = Transcript(job.resumed.published if job.resumed is not None else ())
        self._before = self._transcript.tokens
        self._asked_usage = bool(stream_options(job.body).get("include_usage"))
        self._response: dict[str, Any] | None = None
        self.complete = self._transcript.assembler.finished
        if self._transcript.chunks and not self.complete:
            body = self._transcript.resumed(job.kind, body, chats)
        super().__init__(job, _PATHS[job.kind], body, streams=job.stream and job.kind != "embeddings")

    @property
    def finished(self) -> bool:
        return self._transcript.assembler.finished

    @property
    def resumable(self) -> bool:
        return self._transcript.resumable(self._kind, self._asked, self._chats)

    def chunk(self, doc: dict[str, Any], data: str) -> Chunk | None:
        self._note(doc)
        adapted = self._transcript.adapt(doc)
        if adapted is None:
            return None
        if self._transcript.add(adapted):
            self._note_first()
        if not doc.get("choices") and doc.get("usage"):
            if not self._asked_usage:
                return None
            adapted["usage"] = self._whole_usage()
        return Chunk(document=data if adapted is doc and _is_line(data) else json.dumps(adapted, separators=(",", ":")))

    def whole(self, data: bytes) -> None:
        self._response = document(data)
        self._note(self._response)

    def outcome(self, aborted: bool = False) -> Outcome:
        if self.streams:
            assembler = self._transcript.assembler
            reason = "abort" if aborted and not self.finished else assembler.finish_reason
            response = assembler.response(self._whole_usage(), reason)
            counts = self._counts(self._before, self._transcript.tokens - self._before)
            return Outcome(reason, assembler.text, [], *counts, self._ttft_ms(), response)
        if self._response is None:
            return Outcome("abort", prompt_tokens=self._size)
        choice: dict[str, Any] = next(iter(self._response.get("choices") or ()), {})
        reason = str(choice.get("finish_reason") or "stop")
        return Outcome(reason, choice_text(choice), [], *self._counts(), response=self._response)

    def tokens(self) -> int:
        return super().tokens() or self._transcript.tokens - self._before

    def _whole_usage(self) -> dict[str, Any] | None:
        """The server's usage, with the output of earlier attempts counted as output."""
        if not self._usage or not self._before:
            return self._usage or None
        prompt, output, _ = self._counts(self._before)
        return {**self._usage, "prompt_tokens": prompt, "completion_tokens": output}


def exchange(job: Job, model: str, return_token_ids: bool, chats: bool = False) -> Exchange:
    """Creates the exchange for a job. `chats`: the server can continue a partial message of the assistant.

    Raises:
        CallRejected: the job cannot run or resume on a remote server.
    """
    if job.kind == "generate":
        return GenerateExchange(job, model, return_token_ids)
    if job.kind in _PATHS:
        return OpenAIExchange(job, model, chats)
    raise CallRejected(f"A remote server does not serve {job.kind}; use generate, {', '.join(sorted(_PATHS))}.")


def stream_options(body: dict[str, Any]) -> dict[str, Any]:
    """The caller's stream options; empty if they are missing or not an object."""
    options = body.get("stream_options")
    return options if isinstance(options, dict) else {}


def prompt_size(body: dict[str, Any]) -> int:
    """An estimate of a prompt's tokens, for calls that end before the server has counted them."""
    ids = body.get("prompt_token_ids")
    return len(ids) if isinstance(ids, list) else -(-_characters(body) // _CHARS_A_TOKEN)


def _characters(body: dict[str, Any]) -> int:
    messages = body.get("messages")
    texts = [body.get("prompt"), body.get("input")]
    texts += [m.get("content") for m in (messages if isinstance(messages, list) else ()) if isinstance(m, dict)]
    return sum(len(text) for text in texts if isinstance(text, str))


def _prompt(body: dict[str, Any]) -> str | list[int]:
    text, ids = body.get("prompt"), body.get("prompt_token_ids")
    if (text is None) == (ids is None):
        raise CallRejected("Give either prompt or prompt_token_ids.")
    if text is not None and not isinstance(text, str):
        raise CallRejected("The prompt must be a text; pass token ids in prompt_token_ids.")
    if ids is not None and not isinstance(ids, list):
        raise CallRejected("prompt_token_ids must be a list of whole numbers.")
    return ids if isinstance(ids, list) else str(text)


def _published(before: Resumed) -> tuple[int, str]:
    """The number of tokens that earlier attempts have published, and the finish reason if they published the end."""
    count, _, reason = (before.replays[-1] if before.replays else "").partition(" ")
    known = max(len(before.token_ids), int(count) if count.isdecimal() else 0)
    return known or -(-len(before.text) // _CHARS_A_TOKEN), reason if count.isdecimal() else ""


def _resumed(prompt: str | list[int], before: Resumed, count: int) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt + before.text
    if len(before.token_ids) < count:  # the server sent only text, and text cannot follow ids in one prompt
        raise CallRejected(CANNOT_RESUME)
    return prompt + before.token_ids


def _is_line(data: str) -> bool:
    return "\n" not in data and "\r" not in data


def _number(value: Any) -> int:
    """A count of tokens; 0 if the value cannot be one."""
    return value if isinstance(value, int) and 0 <= value <= MAX_PROMPT_TOKENS else 0
