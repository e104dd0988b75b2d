"""Jobs for a real vLLM, and what readers get from their chunks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import psutil
import pytest

from rsm.workers.backends.base import CallRejected, Chunk, Job, Outcome, Resumed
from rsm.workers.backends.vllm.backend import VllmBackend

PROMPT = "Explain quantum computing"
MESSAGES = [{"role": "user", "content": PROMPT}]
GREEDY = {"max_tokens": 24, "temperature": 0}
LONG = {"max_tokens": 5000, "temperature": 0}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "people": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city", "people", "tags"],
    "additionalProperties": False,
}

# A minimal worker process: starts an engine, prints the pid of its core, and waits.
HOST = """
import asyncio, json, sys
import psutil
from rsm.broker.settings import Settings
from rsm.workers.backends.factory import create_backend
from rsm.workers.config import EngineConfig
async def main():
    config = EngineConfig(engine_id="host", max_num_seqs=4, engine_args=json.loads(sys.argv[1]))
    backend = create_backend(config, Settings())
    await backend.start()
    cores = [p.pid for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name()]
    print("core", *cores, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def job(kind: str = "generate", *, key: str = "c/1", stream: bool = False, **body: Any) -> Job:
    return Job(key, key.split("/")[0], "s", kind, body, stream=stream, priority=2, level=1)


def generate(**more: Any) -> Job:
    return job(**{"prompt": PROMPT, **GREEDY, **more})


def chat(**more: Any) -> Job:
    return job("chat.completions", **{"messages": MESSAGES, **GREEDY, **more})


def completion(**more: Any) -> Job:
    return job("completions", **{"prompt": PROMPT, **GREEDY, **more})


# Requests that never run, and their error messages.
BAD_GENERATE: list[tuple[dict[str, Any], str]] = [
    ({"nope": 1}, "generate has no parameter nope; remove it."),
    ({"n": 2}, "n must be 1 for generate; submit a completions call for several choices."),
    ({"logprobs": 1}, "generate returns no logprobs; submit a completions call instead."),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1.0}, "temperature must be non-negative"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"seed": 1 << 70}, "seed must be a whole number that fits in 64 bits."),
    ({"logit_bias": {"a": 1}}, "logit_bias must map token ids to numbers."),
    ({"prompt_token_ids": [1]}, "Give either prompt or prompt_token_ids."),
    (
        {"prompt": None, "prompt_token_ids": [-1]},
        "prompt_token_ids must be a non-empty list of whole numbers, at least 0.",
    ),
    ({"prompt": None, "prompt_token_ids": [1 << 20]}, "out of vocabulary"),
    ({"prompt": ""}, "cannot be empty"),
    ({"prompt": "word " * 9000}, "longer than the maximum model length"),
    ({"structured_outputs": {"json": "{"}}, "grammar"),
]

BAD_OPENAI: list[tuple[Job, str]] = [
    (chat(model="nope"), "The model `nope` does not exist."),
    (chat(max_tokens=-1), "max_tokens must be at least 1"),
    (chat(max_tokens=-1, stream=True), "max_tokens must be at least 1"),
    (chat(messages=None), "messages must be a list of messages."),
    (job("chat.completions"), "messages: Field required"),
    (chat(temperature="hot"), "temperature: Input should be a valid number"),
    (chat(messages=[{"role": "user", "content": "word " * 9000}]), "maximum context length is 8192 tokens"),
    (completion(prompt="word " * 9000), "maximum context length is 8192 tokens"),
    (completion(max_tokens=float("nan")), "JSON cannot express"),
    (job("embeddings", input="x"), "The model of this engine does not serve embeddings."),
    (job("rerank", query="x"), "vLLM does not serve rerank; use generate, chat.completions, completions, embeddings."),
]


def nothing(_: Chunk) -> None:
    """For jobs that do not stream."""


async def streamed(backend: VllmBackend, j: Job) -> tuple[Outcome, list[Chunk]]:
    chunks: list[Chunk] = []
    return await backend.run(j, chunks.append), chunks


def again(j: Job, chunks: list[Chunk]) -> Job:
    """The job, resumed after these chunks, as the worker reads them back from the call's log."""
    resumed = Resumed(
        text="".join(p.text for p in chunks),
        token_ids=[i for p in chunks for i in p.token_ids],
        replays=[p.replay for p in chunks if p.replay],
        chunks=sum(bool(p.document) for p in chunks),
    )
    return Job(j.key, j.call_id, j.session, j.kind, j.body, stream=True, resumed=resumed)


def said(chunks: list[Chunk]) -> str:
    """The text that the reader of a stream gets."""
    text = "".join(p.text for p in chunks)
    for chunk in chunks:
        for choice in json.loads(chunk.document or "{}").get("choices", []):
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text


def finish_reasons(chunks: list[Chunk]) -> list[str]:
    docs = [json.loads(p.document) for p in chunks]
    return [c["finish_reason"] for d in docs for c in d["choices"] if c["finish_reason"]]


async def rejected(backend: VllmBackend, j: Job) -> str:
    with pytest.raises(CallRejected) as e:
        await backend.run(j, nothing)
    return str(e.value)


async def aborted(backend: VllmBackend, j: Job) -> tuple[Outcome, list[Chunk]]:
    """Runs a job until it must have produced text, then aborts it."""
    asyncio.get_running_loop().call_later(0.4, backend.abort, j.key)
    async with asyncio.timeout(5):
        return await streamed(backend, j)


def engine_core() -> psutil.Process:
    return next(p for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name())
