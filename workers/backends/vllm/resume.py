"""Resumes a request whose first tokens an earlier, lost attempt has published.

The engine gets the published tokens as part of the prompt. Text is made here, by vLLM's own incremental detokenizer,
which gets the published tokens first. So a character or a stop string that spans both attempts is handled correctly.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rsm.workers.backends.base import CallRejected
from rsm.workers.backends.vllm.engine import CANNOT_RESUME

Outputs = AsyncGenerator[Any, None]


@dataclass(frozen=True, slots=True)
class PublishedOutput:
    """One output of an earlier attempt. `stop`: the string or token that ended it; None = end of sequence."""

    token_ids: list[int]
    finish: str = ""
    stop: int | str | None = None


class _Detokenizer:
    def __init__(self, tokenizer: Any, prompt_ids: list[int], params: Any) -> None:
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        request = SimpleNamespace(
            request_id="", prompt_token_ids=prompt_ids, prompt_embeds=None, sampling_params=params
        )
        self._inner = IncrementalDetokenizer.from_new_request(tokenizer if params.detokenize else None, request)

    def add(self, token_ids: Sequence[int], finish: str, stop: int | str | None) -> tuple[str, str | None, int]:
        """Returns the new text, the stop string that it completes, and how many of the tokens belong to the output."""
        before = self._inner.num_output_tokens()
        by_token = finish == "stop" and not isinstance(stop, str)
        found: str | None = self._inner.update(list(token_ids), by_token)
        text = self._inner.get_next_output_text(bool(finish or found), True)
        return text, found, self._inner.num_output_tokens() - before


def check_resumable(params: Any) -> None:
    """Checks that a request depends only on the tokens so far.

    Raises:
        CallRejected: it depends on more.
    """
    # A grammar would start over; log probabilities of published tokens are lost.
    parts = (params.structured_outputs, params.logprobs, params.prompt_logprobs)
    if params.n != 1 or any(part is not None for part in parts):
        raise CallRejected(CANNOT_RESUME)


async def resumed_outputs(
    start: Callable[[Any, Any], Outputs],
    tokenizer: Any,
    prompt: dict[str, Any],
    params: Any,
    published: Sequence[PublishedOutput],
    max_len: int,
    cached_tokens: int = 0,
) -> Outputs:
    """Yields the outputs of a whole request. Those that were published are not computed again.

    Args:
        start: starts a request in the engine, with a prompt and sampling params.
        prompt: vLLM's engine input.
        params: the sampling params of the whole request.
        cached_tokens: prompt tokens that were cached in the earlier attempt.
    """
    check_resumable(params)
    prompt_ids = list(prompt["prompt_token_ids"])
    detokenizer = _Detokenizer(tokenizer, prompt_ids, params)
    ids: list[int] = []
    for one in published:
        ids += one.token_ids
        text, _, _ = detokenizer.add(one.token_ids, one.finish, one.stop)
        yield _output(prompt, one, text, cached_tokens)
        if one.finish:
            return
    left = max_len - len(prompt_ids) - len(ids)
    if params.max_tokens is not None:
        left = min(left, params.max_tokens - len(ids))
    if left <= 0:
        yield _output(prompt, PublishedOutput([], "length"), detokenizer.add([], "length", None)[0], cached_tokens)
        return
    rest = params.clone()
    rest.max_tokens, rest.min_tokens = left, max(0, params.min_tokens - len(ids))
    async with aclosing(start({**prompt, "prompt_token_ids": prompt_ids + ids}, rest)) as outputs:
        async for output in outputs:
            _rewrite(output, detokenizer, prompt_ids)
            yield output
            if output.finished:  # perhaps by a stop string that the engine cannot find
                return


def _rewrite(output: Any, detokenizer: _Detokenizer, prompt_ids: list[int]) -> None:
    one = output.outputs[0]
    one.text, found, kept = detokenizer.add(one.token_ids, one.finish_reason or "", one.stop_reason)
    one.token_ids = list(one.token_ids)[:kept]
    output.prompt_token_ids = prompt_ids
    if found is not None:
        one.finish_reason, one.stop_reason, output.finished = "stop", found, True


def _output(prompt: dict[str, Any], published: PublishedOutput, text: str, cached_tokens: int) -> Any:
    from vllm.outputs import CompletionOutput, RequestOutput

    one = CompletionOutput(
        index=0,
        text=text,
        token_ids=published.token_ids,
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=published.finish or None,
        stop_reason=published.stop,
    )
    return RequestOutput(
        request_id="",
        prompt=prompt.get("prompt"),
        prompt_token_ids=prompt["prompt_token_ids"],
        prompt_logprobs=None,
        outputs=[one],
        finished=bool(published.finish),
        num_cached_tokens=cached_tokens,
    )
