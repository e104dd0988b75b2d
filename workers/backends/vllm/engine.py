"""What calls need of a running vLLM engine, and what its exceptions mean for them."""

from __future__ import annotations

import asyncio
import copy
import importlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from rsm.workers.backends.base import CallRejected, EngineDied, EngineError, Job
from rsm.workers.scheduling.program import LEVELS, Program

CANNOT_CONTINUE = (
    "The engine died in the middle of this stream and it cannot be continued; "
    'submit the call again, with on_engine_loss="restart" if it is to begin anew by itself.'
)
GONE = "vLLM's engine process has ended."

_LONG_PROMPT = 4000  # characters; shorter ones take less time than a trip to a thread
_MAX_MESSAGE = 1000
# As pydantic's errors are printed: 'loc': ('body', 'messages'), 'msg': 'Field required'
_WRONG_FIELD = re.compile(r"""'loc': ('[^']*'|\([^)]*\)), 'msg': (['"])(.*?)\2, '""")


@dataclass(slots=True)
class Engine:
    """An AsyncLLM and its HTTP application.

    Attributes:
        ending: it has stopped a call that nobody asked to stop, so its process is on the way out (SIGTERM).
        by_priority: its scheduler heeds priorities.
    """

    llm: Any
    model: str
    app: Any = None
    ending: bool = False
    by_priority: bool = True
    traces: bool = False
    max_len: int = 0
    tokenizer: Any = None
    _own_tokenizer: Any = None
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "rsm-tokenize"))

    @classmethod
    def of(cls, llm: Any, model: str) -> Engine:
        config = llm.vllm_config
        tokenizer = None if llm.model_config.skip_tokenizer_init else llm.get_tokenizer()
        return cls(
            llm,
            model,
            by_priority=config.scheduler_config.policy == "priority",
            traces=config.observability_config.otlp_traces_endpoint is not None,
            max_len=llm.model_config.max_model_len,
            tokenizer=tokenizer,
            # Tokenizers are not safe across threads, and vLLM uses its own in a thread.
            _own_tokenizer=copy.deepcopy(tokenizer),
        )

    @property
    def dead(self) -> bool:
        return bool(self.llm.errored)

    async def tokenize(self, prompt: str) -> list[int]:
        """The token ids of a prompt, off the event loop if it is long."""
        if self._own_tokenizer is None:
            raise CallRejected("This engine has no tokenizer; give prompt_token_ids instead of prompt.")
        if len(prompt) < _LONG_PROMPT:
            return list(self._own_tokenizer.encode(prompt))
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._threads, self._own_tokenizer.encode, prompt))

    def priority(self, job: Job) -> int:
        """For vLLM, where lower is earlier."""
        return job.priority * LEVELS + job.level if self.by_priority else 0

    def trace_headers(self, job: Job) -> dict[str, str] | None:
        return {"traceparent": job.traceparent} if self.traces and job.traceparent else None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def program_args(job: Job, own: dict[str, Any] | None) -> dict[str, Any]:
    """A request's extra_args, with the program that it belongs to, for a program-aware scheduler in the engine."""
    program = Program(job.program or job.session, job.inherited, job.waited_ms, job.ran_ms)
    return {**(own or {}), **asdict(program)}


def explained(e: Exception, dead: bool) -> Exception:
    """What an exception out of vLLM means for the call."""
    if isinstance(e, (CallRejected, EngineError, EngineDied)):
        return e
    if dead or type(e).__name__ == "EngineDeadError":
        return EngineDied(GONE)
    if isinstance(e, refusals()):
        return CallRejected(sentence(str(e)))
    return EngineError(f"{type(e).__name__} in vLLM")  # the type alone: the message may quote the prompt


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it will never run: a ValueError in 0.20, a class of its own since."""
    found: Any = getattr(importlib.import_module("vllm.exceptions"), "VLLMValidationError", ValueError)
    return (ValueError, found)


def sentence(message: str) -> str:
    """vLLM's message, cut to a length that fits a record. A list of wrong fields is reduced to where and why."""
    wrong = _WRONG_FIELD.findall(message)
    if wrong:
        message = "; ".join(f"{_field(where)}: {why}" for where, _, why in wrong)
    return message.strip()[:_MAX_MESSAGE] or "vLLM refused this request and gave no reason."


def _field(where: str) -> str:
    return ".".join(re.findall(r"\w+", where)).removeprefix("body.")
