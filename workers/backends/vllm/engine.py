"""A running vLLM engine, and the translation of its exceptions."""

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

CANNOT_RESUME = (
    "The engine died during this stream, which cannot be resumed. Submit the call again, with "
    'on_engine_loss="restart" if a lost stream should start over.'
)
PROCESS_ENDED = "vLLM's engine process has ended."

_LONG_PROMPT = 4000  # characters; shorter prompts take less time than a switch to a thread
_MAX_MESSAGE = 1000
# The format of pydantic's errors: 'loc': ('body', 'messages'), 'msg': 'Field required'
_WRONG_FIELD = re.compile(r"""'loc': ('[^']*'|\([^)]*\)), 'msg': (['"])(.*?)\2, '""")


@dataclass(slots=True)
class Engine:
    """An AsyncLLM and its HTTP application.

    Attributes:
        ending: it has stopped a call without an abort, so its process is shutting down (SIGTERM).
        by_priority: its scheduler uses priorities.
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
            # Tokenizers are not thread-safe, and vLLM uses its own in a thread.
            _own_tokenizer=copy.deepcopy(tokenizer),
        )

    @property
    def dead(self) -> bool:
        return bool(self.llm.errored)

    async def tokenize(self, prompt: str) -> list[int]:
        """The token ids of a prompt; a long one is tokenized in a thread."""
        if self._own_tokenizer is None:
            raise CallRejected("This engine has no tokenizer; give prompt_token_ids instead of prompt.")
        if len(prompt) < _LONG_PROMPT:
            return list(self._own_tokenizer.encode(prompt))
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._threads, self._own_tokenizer.encode, prompt))

    def priority(self, job: Job) -> int:
        """vLLM's priority for a job; lower runs first."""
        return job.priority * LEVELS + job.level if self.by_priority else 0

    def trace_headers(self, job: Job) -> dict[str, str] | None:
        return {"traceparent": job.traceparent} if self.traces and job.traceparent else None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def program_args(job: Job, own: dict[str, Any] | None) -> dict[str, Any]:
    """A request's extra_args with its program, for a program-aware scheduler in the engine."""
    program = Program(job.program or job.session, job.inherited, job.waited_ms, job.ran_ms)
    return {**(own or {}), **asdict(program)}


def explained(e: Exception, dead: bool) -> Exception:
    """Translates an exception from vLLM into one of the backend's."""
    if isinstance(e, (CallRejected, EngineError, EngineDied)):
        return e
    if dead or type(e).__name__ == "EngineDeadError":
        return EngineDied(PROCESS_ENDED)
    if isinstance(e, refusals()):
        return CallRejected(short_message(str(e)))
    return EngineError(f"{type(e).__name__} in vLLM")  # only the type, because the message may quote the prompt


def refusals() -> tuple[type[Exception], ...]:
    """The exceptions that vLLM raises for an invalid request: ValueError in 0.20, a class of its own since."""
    found: Any = getattr(importlib.import_module("vllm.exceptions"), "VLLMValidationError", ValueError)
    return (ValueError, found)


def short_message(message: str) -> str:
    """vLLM's message, shortened for a record. A list of wrong fields is reduced to each field and its error."""
    wrong = _WRONG_FIELD.findall(message)
    if wrong:
        message = "; ".join(f"{_field(where)}: {why}" for where, _, why in wrong)
    return message.strip()[:_MAX_MESSAGE] or "vLLM rejected this request without a reason."


def _field(where: str) -> str:
    return ".".join(re.findall(r"\w+", where)).removeprefix("body.")
