"""Builds a checked, encoded call from a caller's arguments."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from rsm.broker.errors import InvalidRequest
from rsm.broker.protocol import codec
from rsm.broker.protocol.ids import new_id, shorten
from rsm.broker.protocol.messages import Submission
from rsm.broker.protocol.models import CallRequest

Prompt = str | Sequence[int] | Mapping[str, Any]

# The average for prose; good enough to weigh a prompt before its engine counts it.
_CHARACTERS_PER_TOKEN = 4
# Levels of nested lists and maps in a body. Schemas of tools have a dozen.
_DEEPEST = 100
# The longest timeout, in seconds: a year.
_LONGEST_S = 366 * 24 * 3600


def build(
    prompt: Prompt,
    *,
    max_body_bytes: int,
    id: str | None = None,  # noqa: A002
    session: str | None = None,
    kind: str = "generate",
    model: str = "",
    priority: int = 0,
    timeout: float | None = None,
    deadline_ms: int | None = None,
    stream: bool = False,
    inbox: str = "",
    prompt_tokens: int | None = None,
    traceparent: str = "",
    on_engine_loss: str = "continue",
    parent_session: str | None = None,
    params: Mapping[str, Any] | None = None,
) -> Submission:
    """Checks and encodes a call.

    Args:
        prompt: text or token ids for `generate`; the request body for OpenAI kinds.
        timeout: the deadline in seconds from now.
        params: further fields of the body, such as `max_tokens`.

    Raises:
        InvalidRequest: something is wrong; the message has one sentence for each mistake.
    """
    body = _body(prompt, params or {})
    check_body(kind, body)
    data = codec.encode(body)
    check_size(len(data), max_body_bytes)
    call_id = new_id() if id is None else id
    request = check_request(
        id=call_id,
        session=call_id if session is None else session,
        kind=kind,
        model=model,
        priority=priority,
        deadline_ms=deadline_ms,
        stream=stream,
        inbox=inbox,
        prompt_tokens=estimate_tokens(body, len(data)) if prompt_tokens is None else prompt_tokens,
        traceparent=traceparent,
        on_engine_loss=on_engine_loss,
        parent_session=parent_session or "",
    )
    return Submission(
        request, codec.digest(request.kind, request.model, data), data, until=_until(timeout, deadline_ms)
    )


def _until(timeout: float | None, deadline_ms: int | None) -> float | None:
    if timeout is None:
        return None
    if deadline_ms is not None:
        raise InvalidRequest("Give either timeout (seconds from now) or deadline_ms (epoch milliseconds), not both.")
    if not (isinstance(timeout, int | float) and 0 <= timeout <= _LONGEST_S):
        raise InvalidRequest(
            f"timeout must be a number of seconds from 0 to {_LONGEST_S}; got {shorten(str(timeout))}."
        )
    return time.monotonic() + timeout


def check_request(**fields: Any) -> CallRequest:
    """Checks the routing fields.

    Raises:
        InvalidRequest: something is wrong; the message has one sentence for each wrong field.
    """
    try:
        return CallRequest(**fields)
    except ValidationError as e:
        raise InvalidRequest(" ".join(_message(error) for error in e.errors(include_url=False))) from None


def _message(error: Any) -> str:
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequest):
        return str(cause)
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}."


def _body(prompt: Prompt, params: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(prompt, Mapping):
        return {**prompt, **params}
    if isinstance(prompt, str):
        return {"prompt": prompt, **params}
    if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray, memoryview)):
        return {"prompt_token_ids": list(prompt), **params}
    raise InvalidRequest(f"The prompt must be text, token ids or a request body; got {type(prompt).__name__}.")


def check_size(size: int, limit: int) -> None:
    """Raises InvalidRequest if a body is larger than the limit, both in bytes."""
    if size > limit:
        raise InvalidRequest(f"The body has {size} bytes, more than the limit of {limit} (RSM_MAX_BODY_BYTES).")


def check_body(kind: str, body: Mapping[str, Any]) -> None:
    """Checks that the body has what its kind needs. The engine checks everything else.

    Raises:
        InvalidRequest: something is missing or wrong. The message never quotes the body.
    """
    _check_values(body)
    if kind == "generate":
        _check_generate(body)
    elif kind == "chat.completions" and not isinstance(body.get("messages"), list):
        raise InvalidRequest('chat.completions needs "messages", a list.')
    elif kind == "completions" and "prompt" not in body:
        raise InvalidRequest('completions needs a "prompt".')
    elif kind == "embeddings" and "input" not in body:
        raise InvalidRequest('embeddings needs an "input".')


def _check_values(body: Mapping[str, Any]) -> None:
    """Rejects non-finite numbers and very deep nesting, because both have crashed engines."""
    level: list[Any] = list(body.values())
    for _ in range(_DEEPEST):
        if any(isinstance(v, float) and not math.isfinite(v) for v in level):
            raise InvalidRequest("The body contains NaN or an infinite number. Use finite numbers.")
        maps = [v.values() for v in level if isinstance(v, dict)]
        level = [item for inner in (*maps, *(v for v in level if isinstance(v, list | tuple))) for item in inner]
        if not level:
            return
    raise InvalidRequest(f"The body is nested more than {_DEEPEST} levels deep. Use fewer levels.")


def _check_generate(body: Mapping[str, Any]) -> None:
    text, ids = body.get("prompt"), body.get("prompt_token_ids")
    if (text is None) == (ids is None):
        raise InvalidRequest('generate needs either a "prompt" (text) or "prompt_token_ids".')
    if text is not None and not (isinstance(text, str) and text):
        raise InvalidRequest('"prompt" must be non-empty text.')
    if ids is not None and not (isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)):
        raise InvalidRequest('"prompt_token_ids" must be a non-empty list of whole numbers that are at least 0.')


def estimate_tokens(body: Mapping[str, Any], size: int) -> int:
    """Estimates the tokens of the prompt. The engine's count replaces the estimate when the call ends."""
    ids = body.get("prompt_token_ids")
    if isinstance(ids, list):
        return len(ids)
    text = body.get("prompt")
    characters = len(text) if isinstance(text, str) else size
    return max(1, characters // _CHARACTERS_PER_TOKEN)
