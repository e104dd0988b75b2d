"""Kind `generate`: a prompt or its token ids and flat sampling params, passed directly to vLLM's engine."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from rsm.workers.backends.base import CallRejected, Chunk, EngineDied, EngineError, Job, Outcome, Resumed
from rsm.workers.backends.vllm.engine import (
    CANNOT_RESUME,
    PROCESS_ENDED,
    Engine,
    explained,
    program_args,
    refusals,
    short_message,
)
from rsm.workers.backends.vllm.reply import running_ms
from rsm.workers.backends.vllm.resume import Outputs, PublishedOutput, resumed_outputs
from rsm.workers.scheduling.service import Used

_PROMPT = frozenset({"prompt", "prompt_token_ids"})
# Fields of SamplingParams that are internal to vLLM, or that need more than text and token ids in the answer.
_RESERVED = frozenset({"output_kind", "skip_clone", "output_text_buffer_length", "flat_logprobs"})
_LOGPROBS = frozenset(
    {"logprobs", "prompt_logprobs", "logprob_token_ids", "prompt_logprob_token_ids", "prompt_logprob_start"}
)
_END = "end "  # begins the replay of the last chunk; the finish reason follows


class GenerateCall:
    """One call. `abort` may be called at any time."""

    def __init__(self, engine: Engine, job: Job, emit: Callable[[Chunk], None]) -> None:
        self._engine = engine
        self._job = job
        self._emit = emit
        self._began = time.perf_counter()
        self._first: float | None = None
        # Not a timeout, but a scope that `abort` can close from outside, and that differs from a cancelled caller.
        self._scope = asyncio.timeout(None)
        self._aborted = False
        self._prompt_ids: list[int] = []
        self._text: list[str] = []
        self._ids: list[int] = []
        self._cached = 0
        self._metrics: Any = None
        self._reason = "abort"

    def abort(self) -> None:
        if not self._aborted:
            self._aborted = True
            self._scope.reschedule(0)

    def used(self) -> Used:
        """What it has used so far, as its answer shows."""
        if self._first is None:
            return Used(0, 0)
        ran_s = time.perf_counter() - self._began
        return Used(len(self._prompt_ids), len(self._ids), self._cached, ran_s, self._first - self._began)

    async def run(self) -> Outcome:
        """Runs the call to its end.

        Raises:
            CallRejected, EngineError, EngineDied: see there.
        """
        before = self._job.resumed
        try:
            async with self._scope:
                await self._run(before if before and (before.text or before.token_ids) else None)
        except TimeoutError:
            if not self._aborted:
                raise
        except Exception as e:
            raise explained(e, self._engine.dead) from e
        if self._reason == "abort" and not self._aborted:
            if self._engine.dead:
                raise EngineDied(PROCESS_ENDED)
            self._engine.ending = True
        return self._outcome()

    async def _run(self, before: Resumed | None) -> None:
        params = sampling_params(self._job)
        self._prompt_ids = await self._prompt()
        if before is None:
            await self._consume(self._start(_input(self._prompt_ids), params), 0)
            return
        if not before.token_ids:  # published by another kind of engine, without ids
            raise CallRejected(CANNOT_RESUME)
        self._text, self._ids = [before.text], list(before.token_ids)
        last = before.replays[-1] if before.replays else ""
        if last.startswith(_END):
            self._reason = last.removeprefix(_END)
            return
        published = [PublishedOutput(before.token_ids)]
        engine = self._engine
        outputs = resumed_outputs(
            self._start, engine.tokenizer, _input(self._prompt_ids), params, published, engine.max_len
        )
        await self._consume(outputs, len(published))

    def _start(self, prompt: Any, params: Any) -> Outputs:
        found: Outputs = self._engine.llm.generate(
            prompt,
            params,
            self._job.key,
            priority=self._engine.priority(self._job),
            trace_headers=self._engine.trace_headers(self._job),
        )
        return found

    async def _consume(self, outputs: Outputs, known: int) -> None:
        """Processes all outputs. Earlier attempts published the first `known` of them."""
        async with aclosing(outputs):
            async for output in outputs:
                if known:
                    known -= 1
                    continue
                self._take(output)

    def _take(self, output: Any) -> None:
        one = output.outputs[0]
        self._metrics = output.metrics
        if self._first is None:
            self._first = time.perf_counter()
            self._cached = output.num_cached_tokens or 0
        self._text.append(one.text)
        self._ids += one.token_ids
        if output.finished:
            self._reason = one.finish_reason
        if self._reason == "error":
            raise EngineError("vLLM ended this request with an error.")
        # Text that was held back for a stop string and comes with an abort is left to the next attempt.
        if self._job.stream and one.finish_reason != "abort":
            replay = f"{_END}{self._reason}" if output.finished else ""
            self._emit(Chunk(one.text, list(one.token_ids), replay=replay))

    def _outcome(self) -> Outcome:
        prompt = len(self._prompt_ids)
        ttft = None if self._first is None else (self._first - self._began) * 1000
        cached = min(self._cached, prompt)
        counts, ran_ms = (prompt, len(self._ids), cached), running_ms(self._metrics)
        return Outcome(self._reason, "".join(self._text), self._ids, *counts, ttft, running_ms=ran_ms)

    async def _prompt(self) -> list[int]:
        text, ids = self._job.body.get("prompt"), self._job.body.get("prompt_token_ids")
        if (text is None) == (ids is None):
            raise CallRejected("Give either prompt or prompt_token_ids.")
        if text is not None:
            if not isinstance(text, str):
                raise CallRejected("The prompt must be a text; pass token ids in prompt_token_ids.")
            return await self._engine.tokenize(text)
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise CallRejected("prompt_token_ids must be a non-empty list of whole numbers, at least 0.")
        return ids


def sampling_params(job: Job) -> Any:
    """vLLM's sampling params from a body.

    Raises:
        CallRejected: a parameter is unknown or has an invalid value.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    given = {name: value for name, value in job.body.items() if name not in _PROMPT and value is not None}
    _check_names(given, {n for n in SamplingParams.__struct_fields__ if not n.startswith("_")} - _RESERVED)
    if given.get("n", 1) != 1:
        raise CallRejected("n must be 1 for generate; submit a completions call for several choices.")
    given["extra_args"] = program_args(job, _mapping(given, "extra_args"))
    if "logit_bias" in given:
        given["logit_bias"] = _logit_bias(_mapping(given, "logit_bias"))
    if not -(1 << 63) <= _number(given.get("seed", 0)) < 1 << 63:  # a larger one would kill the engine
        raise CallRejected("seed must be a whole number that fits in 64 bits.")
    convert = importlib.import_module("msgspec").convert
    wrong: tuple[type[Exception], ...] = (TypeError, *refusals())
    try:
        # The engine process converts them in the same way. A value of the wrong type must fail here, not there.
        params = convert(given, SamplingParams)
    except wrong as e:
        raise CallRejected(f"The sampling params are invalid: {short_message(str(e))}") from e
    params.output_kind = RequestOutputKind.DELTA
    return params


def _check_names(given: dict[str, Any], allowed: set[str]) -> None:
    for name in given:
        if name in _LOGPROBS:
            raise CallRejected(f"generate returns no {name}; submit a completions call instead.")
        if name not in allowed:
            raise CallRejected(f"generate has no parameter {name}; remove it.")


def _mapping(given: dict[str, Any], name: str) -> dict[Any, Any]:
    value = given.get(name, {})
    if not isinstance(value, dict):
        raise CallRejected(f"{name} must be an object.")
    return value


def _logit_bias(bias: dict[Any, Any]) -> dict[int, Any]:
    """Converts the keys to numbers, because keys in JSON are texts."""
    try:
        return {int(token): value for token, value in bias.items()}
    except (TypeError, ValueError) as e:
        raise CallRejected("logit_bias must map token ids to numbers.") from e


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _input(prompt_ids: list[int]) -> Any:
    from vllm.inputs import tokens_input

    return tokens_input(prompt_ids)
