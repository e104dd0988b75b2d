"""Going on with a request whose first tokens an earlier, lost attempt has published.

What was said is tokenized output: the engine takes it as part of the prompt and goes on from there. Text is made here,
by vLLM's own incremental detokenizer, which is first fed what was said: so a character or a stop string that began
before the border and ends behind it comes out as if there had been no border.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rsm.workers.backends.base import CallRejected
from rsm.workers.backends.vllm.engine import CANNOT_CONTINUE

Outputs = AsyncGenerator[Any, None]


@dataclass(frozen=True, slots=True)
class Said:
    """One output of the earlier attempt. `stop`: the string or token that ended it, None = the end of sequence."""

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
        """New text, the stop string that it completes, and how many of the tokens belong to the output."""
        before = self._inner.num_output_tokens()
        by_token = finish == "stop" and not isinstance(stop, str)
        found: str | None = self._inner.update(list(token_ids), by_token)
        text = self._inner.get_next_output_text(bool(finish or found), True)
        return text, found, self._inner.num_output_tokens() - before


def check_continuable(params: Any) -> None:
    """Some requests depend on more than the tokens so far.

    Raises:
        CallRejected: this one does.
    """
    # A grammar would begin anew; log probabilities of what was said are lost.
    parts = (params.structured_outputs, params.logprobs, params.prompt_logprobs)
    if params.n != 1 or any(part is not None for part in parts):
        raise CallRejected(CANNOT_CONTINUE)


async def continued(
    start: Callable[[Any, Any], Outputs],
    tokenizer: Any,
    prompt: dict[str, Any],
    params: Any,
    said: Sequence[Said],
    max_len: int,
    cached_tokens: int = 0,
) -> Outputs:
    """The outputs of a whole request, of which `said` are not computed again.

    Args:
        start: starts a request in the engine, with a prompt and sampling params.
        prompt: vLLM's engine input.
        params: of the whole request.
        cached_tokens: of the prompt, in the earlier attempt.
    """
    check_continuable(params)
    prompt_ids = list(prompt["prompt_token_ids"])
    detokenizer = _Detokenizer(tokenizer, prompt_ids, params)
    ids: list[int] = []
    for one in said:
        ids += one.token_ids
        text, _, _ = detokenizer.add(one.token_ids, one.finish, one.stop)
        yield _output(prompt, one, text, cached_tokens)
        if one.finish:
            return
    left = max_len - len(prompt_ids) - len(ids)
    if params.max_tokens is not None:
        left = min(left, params.max_tokens - len(ids))
    if left <= 0:
        yield _output(prompt, Said([], "length"), detokenizer.add([], "length", None)[0], cached_tokens)
        return
    rest = params.clone()
    rest.max_tokens, rest.min_tokens = left, max(0, params.min_tokens - len(ids))
    async with aclosing(start({**prompt, "prompt_token_ids": prompt_ids + ids}, rest)) as outputs:
        async for output in outputs:
            _rewrite(output, detokenizer, prompt_ids)
            yield output
            if output.finished:  # perhaps by a stop string that the engine does not see
                return


def _rewrite(output: Any, detokenizer: _Detokenizer, prompt_ids: list[int]) -> None:
    one = output.outputs[0]
    one.text, found, kept = detokenizer.add(one.token_ids, one.finish_reason or "", one.stop_reason)
    one.token_ids = list(one.token_ids)[:kept]
    output.prompt_token_ids = prompt_ids
    if found is not None:
        one.finish_reason, one.stop_reason, output.finished = "stop", found, True


def _output(prompt: dict[str, Any], said: Said, text: str, cached_tokens: int) -> Any:
    from vllm.outputs import CompletionOutput, RequestOutput

    one = CompletionOutput(
        index=0,
        text=text,
        token_ids=said.token_ids,
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=said.finish or None,
        stop_reason=said.stop,
    )
    return RequestOutput(
        request_id="",
        prompt=prompt.get("prompt"),
        prompt_token_ids=prompt["prompt_token_ids"],
        prompt_logprobs=None,
        outputs=[one],
        finished=bool(said.finish),
        num_cached_tokens=cached_tokens,
    )
