"""A miniature engine core: vLLM's real Scheduler class with a model runner made of dictionaries.

The runner keeps the same state as a real one: the tokens of each request, received or sampled, and the contents of the
KV blocks. The next token is a hash of the whole prefix, read back from the blocks. So a token that is lost, repeated or
out of order, or a block that is freed too early, changes everything that follows.

With `asynchronous` two batches are in flight, as in vLLM's engine core: a step is planned while the previous one runs.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

BLOCK = 4
VOCABULARY = 50_000
_MASK = (1 << 61) - 1


def prepare() -> str:
    """Makes vLLM importable without its kernels, and quiet; returns its version."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    import vllm

    try:
        return importlib.metadata.version("vllm").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return str(vllm.__version__).partition("+")[0]


def chained(prefix: int, token: int) -> int:
    return (prefix * 1_000_003 + token + 1) & _MASK


def next_token(prefix: int) -> int:
    return (prefix * 2_654_435_761 >> 7) % VOCABULARY


def answer(prompt: Iterable[int], size: int) -> list[int]:
    """Returns the model's answer to a prompt."""
    prefix, tokens = 0, []
    for token in prompt:
        prefix = chained(prefix, token)
    for _ in range(size):
        tokens.append(next_token(prefix))
        prefix = chained(prefix, tokens[-1])
    return tokens


@dataclass(slots=True)
class _Known:
    """The model runner's state of a request."""

    tokens: list[int]
    blocks: list[int]


class Runner:
    """Executes the scheduler's plans."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, int], int] = {}  # by block and offset: hash of the prefix up to there
        self._known: dict[str, _Known] = {}

    def execute(self, output: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        self._update(output)
        sampled = []
        for request_id, count in output.num_scheduled_tokens.items():
            sampled.append(self._compute(request_id, self._at[request_id], count))
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def _update(self, output: Any) -> None:
        for request_id in output.finished_req_ids:
            self._known.pop(request_id, None)
        self._at: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            tokens = getattr(new, "prefill_token_ids", None) or new.prompt_token_ids
            self._known[new.req_id] = _Known(list(tokens), list(new.block_ids[0]))
            self._at[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            known, blocks = self._known[request_id], cached.new_block_ids[i]
            if request_id in cached.all_token_ids:
                known.tokens = list(cached.all_token_ids[request_id])
            if request_id in cached.resumed_req_ids:
                known.blocks = list(blocks[0])
            elif blocks is not None:
                known.blocks += blocks[0]
            self._at[request_id] = cached.num_computed_tokens[i]

    def _compute(self, request_id: str, at: int, count: int) -> list[int]:
        known = self._known[request_id]
        assert at + count <= len(known.tokens), f"{request_id}: token {at + count} of {len(known.tokens)} is not known"
        prefix = 0
        for position in range(at):
            prefix = chained(prefix, known.tokens[position])
            assert self.blocks.get(self._place(known, position)) == prefix, f"{request_id}: block of {position} is lost"
        for position in range(at, at + count):
            prefix = chained(prefix, known.tokens[position])
            self.blocks[self._place(known, position)] = prefix
        if at + count < len(known.tokens):
            return []
        known.tokens.append(next_token(prefix))
        return known.tokens[-1:]

    @staticmethod
    def _place(known: _Known, position: int) -> tuple[int, int]:
        return known.blocks[position // BLOCK], position % BLOCK


@dataclass(slots=True)
class Call:
    """A planned request, and its result."""

    name: str
    prompt: list[int]
    size: int
    at: int = 0  # step at which it arrives
    priority: int = 0  # vLLM's: class and level
    program: dict[str, Any] = field(default_factory=dict)
    abort_at: int | None = None
    said: list[int] = field(default_factory=list)
    finished: str = ""
    ended_at: int = 0
    preempted: int = 0

    @property
    def right(self) -> bool:
        whole = answer(self.prompt, self.size)
        return whole[: len(self.said)] == self.said and (self.finished == "abort" or len(self.said) == self.size)


@dataclass(slots=True)
class Engine:
    """The scheduler and its runner.

    Attributes:
        steps: number of planned steps.
        before, after: called before and after planning each step.
    """

    scheduler: Any
    runner: Runner
    asynchronous: bool
    steps: int = 0
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None
    _flying: deque[tuple[Any, Any]] = field(default_factory=deque)
    _calls: dict[str, Call] = field(default_factory=dict)
    _requests: dict[str, Any] = field(default_factory=dict)

    def add(self, call: Call) -> None:
        request = make_request(call)
        self._calls[call.name], self._requests[call.name] = call, request
        self.scheduler.add_request(request)

    def abort(self, call: Call) -> None:
        from vllm.v1.request import RequestStatus

        if not call.finished:
            call.finished, call.ended_at = "abort", self.steps
            self.scheduler.finish_requests(call.name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Runs one iteration of the engine core's loop."""
        scheduler = self.scheduler
        if scheduler.has_requests():
            self.before()
            output = scheduler.schedule()
            self.after()
            self.steps += 1
            self._flying.append((output, self.runner.execute(output)))
            if self.asynchronous and len(self._flying) < 2 and output.total_num_scheduled_tokens:
                return
        if self._flying:
            self._take(scheduler.update_from_output(*self._flying.popleft()))

    def _take(self, outputs: dict[int, Any]) -> None:
        for batch in outputs.values():
            for one in batch.outputs:
                call = self._calls[one.request_id]
                if call.finished:
                    continue
                call.said += one.new_token_ids
                if one.finish_reason is not None:
                    call.finished, call.ended_at = str(one.finish_reason), self.steps
                    call.preempted = self._requests[call.name].num_preemptions

    def run(self, calls: Iterable[Call], most_steps: int = 20_000) -> None:
        """Runs calls, which arrive and are aborted at given steps, until all have ended."""
        coming = deque(sorted(calls, key=lambda call: call.at))
        doomed = [call for call in coming if call.abort_at is not None]
        turns = 0
        while coming or self.scheduler.has_requests() or self._flying:
            while coming and coming[0].at <= turns:
                self.add(coming.popleft())
            for call in doomed:
                if call.abort_at == turns and call.name in self._calls:
                    self.abort(call)
            self.step()
            turns += 1
            assert turns < most_steps, f"some calls have not ended after {most_steps} steps"

    def left(self) -> dict[str, Any]:
        """Returns the counts that are not zero; once all calls have ended there should be none."""
        s = self.scheduler
        pool = s.kv_cache_manager.block_pool
        found = {
            "requests": len(s.requests),
            "running": len(s.running),
            "waiting": sum(s.get_request_counts()),
            "unfinished": s.get_num_unfinished_requests(),
            "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "tracked": len(getattr(s, "_tracked", ())) + len(getattr(s, "_parked", ())),
            "ranks": sum(getattr(s, "_ranks", {}).values()),
        }
        return {name: count for name, count in found.items() if count}


def make_request(call: Call) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=call.size, ignore_eos=True, temperature=0, extra_args=call.program or None)
    if hasattr(params, "update_from_generation_config"):
        params.update_from_generation_config({}, eos_token_id=VOCABULARY)
    return Request(
        request_id=call.name,
        prompt_token_ids=list(call.prompt),
        sampling_params=params,
        pooling_params=None,
        priority=call.priority,
        block_hasher=get_request_block_hasher(BLOCK, lambda value: sha256(repr(value).encode()).digest()),
    )


def make_engine(
    scheduler_class: Any,
    *,
    asynchronous: bool = False,
    slots: int = 4,
    blocks: int = 1000,
    step_tokens: int = 256,
    policy: str = "priority",
    model: str = "",
) -> Engine:
    """Returns an engine with the scheduler that `scheduler_class` makes from vLLM's configuration."""
    import torch
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from rsm.workers.backends.vllm.start.tiny_model import ensure_tiny_model

    kv_cache_utils.init_none_hash(lambda value: sha256(repr(value).encode()).digest())
    max_len = 8192
    config = VllmConfig(
        model_config=ModelConfig(
            model=model or str(ensure_tiny_model()), dtype="float32", skip_tokenizer_init=True, max_model_len=max_len
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=slots,
            max_num_batched_tokens=step_tokens,
            max_model_len=max_len,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            policy=policy,
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
    )
    config.scheduler_config.async_scheduling = asynchronous  # set here, because vLLM turns it off on a CPU
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    scheduler = scheduler_class(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        include_finished_set=False,
        log_stats=False,
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )
    return Engine(scheduler, Runner(), asynchronous)


def stock(**arguments: Any) -> Any:
    """Returns vLLM's own scheduler."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    asynchronous = arguments["vllm_config"].scheduler_config.async_scheduling
    return (AsyncScheduler if asynchronous else Scheduler)(**arguments)
