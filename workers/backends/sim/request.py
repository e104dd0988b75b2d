"""The bodies that a modelled engine accepts, and its OpenAI responses."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from rsm.workers.backends.base import CallRejected, Job, Resumed
from rsm.workers.backends.sim.engine import SimConfig
from rsm.workers.backends.sim.text import Answer, Prompt, answer

DEFAULT_MAX_TOKENS = 16
_NO_STOPS: tuple[str, ...] = ()
# The ranges of sampling params: lowest value, highest value, integers only.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "max_tokens": (1, 1 << 31, True),
    "max_completion_tokens": (1, 1 << 31, True),
    "min_tokens": (0, 1 << 31, True),
    "n": (1, 1, True),
    "best_of": (1, 1, True),
    "temperature": (0, 1 << 31, False),
    "top_p": (0, 1, False),
    "top_k": (-1, 1 << 31, True),
    "min_p": (0, 1, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "repetition_penalty": (0, 1 << 31, False),
}


@dataclass(frozen=True, slots=True)
class Request:
    """A checked job with its answer.

    Attributes:
        prompt_tokens: the size of the prompt.
        published: output tokens published by earlier attempts; more than the answer has: the usage chunk, too.
    """

    prompt: Prompt
    prompt_tokens: int
    answer: Answer
    published: int = 0
    sent: int = 0  # characters published by earlier attempts
    created: int = 0  # creation time of the earlier attempt's chunks, in epoch seconds
    fatal: bool = False  # it kills the engine


def read(job: Job, config: SimConfig) -> Request:
    """Checks a job's body and decides its answer.

    Raises:
        CallRejected: the body cannot run; the message says what to change.
    """
    prompt = read_prompt(job)
    body, size = job.body, prompt.size()
    _check_ranges(body)
    left = config.max_len - size
    if left < 1:
        raise CallRejected(
            f"The prompt has {size} tokens; this engine takes at most {config.max_len - 1}. Shorten the prompt."
        )
    asked = body.get("max_completion_tokens") or body.get("max_tokens") or DEFAULT_MAX_TOKENS
    stops = _stops(body["stop"]) if body.get("stop") else _NO_STOPS
    eos_mean = 0 if body.get("ignore_eos") else config.eos_mean
    seed, skip = prompt.origin()
    found = answer(seed, min(asked, left), stops, eos_mean, skip)
    fatal = bool(config.die_on) and config.die_on in prompt.text
    if job.resumed is None:
        return Request(prompt, size, found, fatal=fatal)
    return Request(prompt, size, found, *_position(job.kind, job.resumed), fatal=fatal)


def read_prompt(job: Job) -> Prompt:
    """The prompt of a job.

    Raises:
        CallRejected: it has no valid prompt.
    """
    return Prompt.of(_prompt(job))


def _prompt(job: Job) -> Any:
    if job.kind == "generate":
        return _generate_prompt(job.body)
    if job.kind == "chat.completions":
        return _chat_prompt(job.body)
    if job.kind == "completions":
        return _single(job.body.get("prompt"))
    raise CallRejected(f"A modelled engine does not serve {job.kind}; use generate, completions or chat.completions.")


def _generate_prompt(body: dict[str, Any]) -> Any:
    text, ids = body.get("prompt"), body.get("prompt_token_ids")
    if (text is None) == (ids is None):
        raise CallRejected("Give either prompt or prompt_token_ids.")
    if text is not None and not isinstance(text, str):
        raise CallRejected("The prompt must be a text; pass token ids in prompt_token_ids.")
    return ids if text is None else text


def _single(prompt: Any) -> Any:
    """Unwraps a list with one prompt, as OpenAI's API allows it."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise CallRejected("Several prompts in one call are not supported; submit one call per prompt.")
        return prompt[0]
    return prompt


def _chat_prompt(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise CallRejected("messages must be a list of at least one message.")
    messages = list(messages)
    head = json.dumps(body["tools"]) if body.get("tools") else ""
    begun = _content(messages.pop()) if body.get("continue_final_message") else ""
    turns = [f"<|{m.get('role', 'user')}|> {_content(m)}\n" for m in messages]
    return head + "".join(turns) + "<|assistant|>" + begun


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [None]
    if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        raise CallRejected("The content of a message must be a text or a list of parts of type text.")
    return "".join(part["text"] for part in parts)


def _check_ranges(body: dict[str, Any]) -> None:
    for name, value in body.items():
        if value is None or name not in _RANGES:
            continue
        low, high, whole = _RANGES[name]
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise CallRejected(f"{name} must be {_allowed(low, high, whole)}.")


def _allowed(low: float, high: float, whole: bool) -> str:
    number = "a whole number" if whole else "a number"
    if low == high:
        return f"{low:g}"
    return f"{number} from {low:g} to {high:g}" if high < 1 << 31 else f"{number}, at least {low:g}"


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise CallRejected("stop must be a non-empty text or a list of non-empty texts.")
    return tuple(stops)


def _position(kind: str, resumed: Resumed) -> tuple[int, int, int]:
    """The tokens and characters published by earlier attempts, and the chunks' creation time."""
    if kind == "generate":
        return len(resumed.token_ids), len(resumed.text), 0
    if not resumed.chunks:
        return 0, 0, 0
    match = re.fullmatch(r"sim (\d+) (\d+) (\d+)", resumed.replays[-1] if resumed.replays else "")
    if match is None:
        raise CallRejected(
            "This stream began on another kind of engine and cannot resume here. Submit the call again, with "
            'on_engine_loss="restart" if a lost stream should start over.'
        )
    return int(match[1]), int(match[2]), int(match[3])


def replay(tokens: int, sent: int, created: int) -> str:
    """The replay text that `_position` reads."""
    return f"sim {tokens} {sent} {created}"


@dataclass(frozen=True, slots=True)
class Shape:
    """The OpenAI documents of one call. `created` is in epoch seconds."""

    chat: bool
    id: str
    model: str
    created: int
    usage_wanted: bool = field(default=False)

    @classmethod
    def of(cls, job: Job, model: str, created: int) -> Shape:
        chat = job.kind == "chat.completions"
        options = job.body.get("stream_options")
        wanted = isinstance(options, dict) and bool(options.get("include_usage"))
        name = f"{'chatcmpl' if chat else 'cmpl'}-{job.call_id}"
        return cls(chat, name, job.body.get("model") or model, created, wanted)

    def response(self, text: str, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """The body of a call that does not stream."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._document("chat.completion", [self._choice(content, reason)]) | {"usage": usage}

    def role_chunk(self) -> str:
        """The chunk that opens a chat's stream."""
        return self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])

    def text_chunk(self, text: str, reason: str | None) -> str:
        """A chunk with new text. The last one has the finish reason."""
        return self._chunk([self._choice({"delta": {"content": text}} if self.chat else {"text": text}, reason)])

    def usage_chunk(self, usage: dict[str, Any]) -> str:
        """The chunk after the last choice."""
        return self._chunk([], usage=usage)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return json.dumps(self._document("chat.completion.chunk", choices) | more, separators=(",", ":"))

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = kind if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Token counts in OpenAI's format."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
