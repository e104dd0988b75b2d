"""Requests to vLLM's HTTP application and its replies: bodies, counts, refusals, and the replay of a stream."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from rsm.workers.backends.base import CallRejected, EngineError, Job, Outcome
from rsm.workers.backends.vllm.engine import CANNOT_RESUME, short_message
from rsm.workers.backends.vllm.resume import PublishedOutput
from rsm.workers.scheduling.service import Used

_RETRY_LATER = frozenset({408, 429})  # not the call's fault
_NOT_SERVED = 501


def request(job: Job, model: str) -> bytes:
    """The body for vLLM.

    Raises:
        CallRejected: it has a value that JSON cannot express.
    """
    body = {**job.body, "model": job.body.get("model") or model}
    if job.kind == "chat.completions" and not isinstance(body.get("messages", []), list):
        raise CallRejected("messages must be a list of messages.")  # vLLM's own error does not mention messages
    if job.kind != "embeddings":
        body["stream"] = job.stream
    if not job.stream:
        body.pop("stream_options", None)
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise CallRejected(
            "The body has a value that JSON cannot express; use texts, numbers, lists and objects."
        ) from e


def refusal(status: int, body: bytes, kind: str) -> CallRejected | EngineError:
    """The error for a status other than 200."""
    try:
        doc = json.loads(body)
    except ValueError:
        doc = None
    inner = doc.get("error") if isinstance(doc, dict) else None
    message = inner.get("message") if isinstance(inner, dict) else None
    if message is None and status in (404, 405, _NOT_SERVED):
        return CallRejected(f"The model of this engine does not serve {kind}.")
    if (400 <= status < 500 and status not in _RETRY_LATER) or status == _NOT_SERVED:
        return CallRejected(short_message(str(message or "")))
    return EngineError(f"vLLM answered {status}: {short_message(str(message or 'no message'))}")


@dataclass(slots=True)
class Counts:
    """The token counts of one call, from the engine's outputs. vLLM's own usage, if there is one, takes precedence."""

    began: float
    text: str = ""
    cached_tokens: int = 0
    _first: float | None = None
    _ttft_ms: float | None = None
    _prompts: dict[int, int] = field(default_factory=dict)
    _output: int = 0
    _metrics: Any = None
    _usage: dict[str, Any] = field(default_factory=dict)

    def add(self, output: Any, number: int) -> None:
        """Adds an output of the call's request `number`."""
        if self._first is None:
            self._first = time.perf_counter()
            self._ttft_ms = _engine_ttft_ms(output) or (self._first - self.began) * 1000
        if not number:
            self._metrics = output.metrics
        if output.prompt_token_ids is not None:
            if number not in self._prompts:
                self.cached_tokens += output.num_cached_tokens or 0
            self._prompts[number] = len(output.prompt_token_ids)
        for one in output.outputs:
            self._output += len(one.token_ids)
            if not number and not one.index:
                self.text += one.text

    def used(self) -> Used:
        """What the call has used so far, as its outputs show."""
        if self._first is None:
            return Used(0, 0)
        prompt, ran_s = sum(self._prompts.values()), time.perf_counter() - self.began
        return Used(prompt, self._output, self.cached_tokens, ran_s, self._first - self.began)

    def note_usage(self, doc: dict[str, Any]) -> None:
        self._usage = doc.get("usage") or self._usage

    def usage(self) -> dict[str, Any]:
        """The usage in OpenAI's format."""
        if self._usage:
            return self._usage
        prompt = sum(self._prompts.values())
        return {"prompt_tokens": prompt, "completion_tokens": self._output, "total_tokens": prompt + self._output}

    def outcome(self, reason: str, text: str, response: dict[str, Any] | None = None) -> Outcome:
        usage = self.usage()
        prompt, output = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        cached = min(self.cached_tokens, prompt)
        return Outcome(reason, text, [], prompt, output, cached, self._ttft_ms, response, running_ms(self._metrics))


def running_ms(metrics: Any) -> float | None:
    """From its first step to its latest token, on the clock of vLLM's core; None if it has not run or is unknown."""
    began, last = getattr(metrics, "scheduled_ts", 0.0), getattr(metrics, "last_token_ts", 0.0)
    return (last - began) * 1000 if last > began > 0 else None


def _engine_ttft_ms(output: Any) -> float | None:
    """vLLM's own measurement, for a call that has only a final output."""
    latency = getattr(output.metrics, "first_token_latency", 0.0) if output.finished else 0.0
    return latency * 1000 if latency else None


@dataclass(slots=True)
class Replay:
    """The replay of a stream: which outputs of the engine led to which chunk.

    Each published chunk has the outputs that vLLM's application got since the last one. The next attempt feeds them to
    the application again, so that its parsers reach the same state. It produces the same chunks again; the first
    `chunks` of them are dropped.

    Attributes:
        published: outputs of earlier attempts.
        created: creation time of all chunks of the stream, in epoch seconds; 0 = this attempt is the first.
    """

    published: list[PublishedOutput] = field(default_factory=list)
    chunks: int = 0
    created: int = 0
    cached_tokens: int = 0
    _recorded: list[list[int]] = field(default_factory=list)
    _finish: str = ""
    _stop: int | str | None = None
    _count: int = 0
    _began: bool = False

    @classmethod
    def of(cls, job: Job) -> Replay:
        """Reads the replay of earlier attempts.

        Raises:
            CallRejected: another kind of engine wrote it.
        """
        if job.resumed is None or not job.resumed.chunks:
            return cls()
        made = cls(chunks=job.resumed.chunks, _began=True)
        try:
            for line in job.resumed.replays:
                made._read(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise CallRejected(CANNOT_RESUME) from e
        return made

    def _read(self, line: dict[str, Any]) -> None:
        outputs = [PublishedOutput(ids) for ids in line["d"]]
        if "f" in line:
            outputs[-1] = PublishedOutput(outputs[-1].token_ids, line["f"], line.get("s"))
        self.published += outputs
        self.created = line.get("t", self.created)
        self.cached_tokens = line.get("k", self.cached_tokens)

    def record(self, output: Any) -> None:
        """Records an output for vLLM's application, unless it comes from an earlier attempt."""
        self._count += 1
        if self._count <= len(self.published):
            return
        one = output.outputs[0]
        self._recorded.append(list(one.token_ids))
        self._finish, self._stop = one.finish_reason or "", one.stop_reason

    def line(self, chunk: dict[str, Any], cached_tokens: int) -> str:
        """The replay text to publish with a chunk."""
        if not self._recorded:
            return ""
        line: dict[str, Any] = {"d": self._recorded}
        if not self._began:
            self._began = True
            line |= {"t": chunk.get("created", 0), "k": cached_tokens}
        if self._finish:
            line |= {"f": self._finish, "s": self._stop}
        self._recorded = []
        return json.dumps(line, separators=(",", ":"))
