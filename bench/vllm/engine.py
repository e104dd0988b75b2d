"""A real vLLM engine with a log of its steps, and the calls that run on it.

The default model has 8B parameters in Llama's shape with dummy weights, because the cost of a step does not depend on
the weights.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rsm.broker.settings import Settings
from rsm.simulation.calibration.step_costs import Timed, durations
from rsm.workers.backends.vllm import steps as log
from rsm.workers.backends.vllm.start.args import prepare_environment
from rsm.workers.config import EngineConfig
from rsm.workers.scheduling.program import CONFIG_KEY, as_config

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SCHEDULERS = {"plas": "rsm.workers.scheduling.vllm_plugin.make_scheduler", "priority": "", "fcfs": ""}
_DEFAULTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "max_model_len": 32768,
    "enable_prefix_caching": True,
    "disable_log_stats": True,
}


@dataclass(slots=True)
class Call:
    """The result of one call; times of the monotonic clock, in seconds."""

    name: str
    prompt: int
    output: int
    came: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    tokens: list[int] = field(default_factory=list, repr=False)


@dataclass(slots=True)
class Phase:
    name: str
    began: float
    ended: float = 0.0

    def holds(self, moment: float) -> bool:
        return self.began <= moment < self.ended


class Engine:
    """A running engine, and its calls and phases so far."""

    def __init__(self, llm: Any, folder: Path) -> None:
        self._llm = llm
        self._folder = folder
        self.calls: list[Call] = []
        self.phases: list[Phase] = []
        config = llm.vllm_config
        self.slots: int = config.scheduler_config.max_num_seqs
        self.step_tokens: int = config.scheduler_config.max_num_batched_tokens
        self.kv_tokens: int = config.cache_config.num_gpu_blocks * config.cache_config.block_size
        self.longest: int = config.model_config.max_model_len
        self._vocabulary: int = config.model_config.get_vocab_size()

    async def call(self, name: str, prompt: int, output: int, service: int = 0, level: int = 0) -> Call:
        """Runs one greedy call of its own program, which has used `service`; its name is the seed of its prompt."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        ids = random.Random(name).choices(range(self._vocabulary), k=prompt)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"program_id": name, "program_service": service},
        )
        call = Call(name, prompt, output, time.monotonic())
        self.calls.append(call)
        async for output_chunk in self._llm.generate(tokens_input(ids), params, name, priority=level):
            call.first = call.first or time.monotonic()
            call.tokens += output_chunk.outputs[0].token_ids
        call.ended = time.monotonic()
        return call

    async def phase(self, name: str, *work: Awaitable[Any]) -> None:
        """Runs work concurrently, as a named phase."""
        found = Phase(name, time.monotonic())
        self.phases.append(found)
        await asyncio.gather(*work)
        found.ended = time.monotonic()
        await asyncio.sleep(0.05)

    async def warm_up(self) -> None:
        """Makes vLLM compile the kernels that it compiles on first use."""
        for n in range(2):
            await self.phase("warm-up", *(self.call(f"warm-up {n} {i}", 300, 30) for i in range(20)))

    async def steps(self) -> list[Timed]:
        """Returns all logged steps so far."""
        await asyncio.sleep(3 * log.EVERY_S)
        return durations(list(log.read(self._folder / "steps.jsonl")))

    def described(self) -> dict[str, Any]:
        """Returns a description of the engine and its device."""
        import torch
        import vllm
        from vllm.platforms import current_platform

        config = self._llm.vllm_config
        return {
            "device": current_platform.get_device_name(),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "model": config.model_config.model,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "asynchronous": bool(config.scheduler_config.async_scheduling),
            "slots": self.slots,
            "step_tokens": self.step_tokens,
            "kv_tokens": self.kv_tokens,
        }

    def save(self) -> None:
        """Writes phases and calls beside the log of steps, and the tokens of each call into a separate file."""
        calls = [asdict(c) | {"tokens": None} for c in self.calls]
        (self._folder / "calls.json").write_text(
            json.dumps({"phases": [asdict(p) for p in self.phases], "calls": calls})
        )
        (self._folder / "tokens.json").write_text(json.dumps({c.name: c.tokens for c in self.calls}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="Folder for the measurements.")
    parser.add_argument(
        "--model", default="", help='Model name or path; "" for 8B parameters in Llama\'s shape with dummy weights.'
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="priority", help="fcfs and priority are vLLM's own.")
    parser.add_argument("--async", dest="asynchronous", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--engine-arg", action="append", default=[], metavar="NAME=JSON", help="An argument of vLLM.")


@asynccontextmanager
async def started(args: argparse.Namespace) -> AsyncIterator[Engine]:
    """Runs the engine that the command line describes until the end of the block."""
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "steps.jsonl"
    file.unlink(missing_ok=True)
    prepare_environment(EngineConfig(engine_id="bench"))
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    ours = log.logged(file, SCHEDULERS[args.scheduler])
    ours[CONFIG_KEY]["settings"] = as_config(Settings())
    began = time.monotonic()
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(**_options(args), scheduler_cls=log.FACTORY, additional_config=ours)
    )
    try:
        engine = Engine(llm, args.out)
        print(f"up after {time.monotonic() - began:.1f} s; {engine.slots} slots, {engine.kv_tokens} tokens", flush=True)
        await engine.warm_up()
        yield engine
        engine.save()
    finally:
        llm.shutdown()


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options = {**_DEFAULTS, "model": args.model or _llama(args.out), "async_scheduling": args.asynchronous}
    options["scheduling_policy"] = "fcfs" if args.scheduler == "fcfs" else "priority"
    if not args.model:
        options["load_format"] = "dummy"
    return options | {name: json.loads(value) for name, _, value in (a.partition("=") for a in args.engine_arg)}


def _llama(where: Path) -> str:
    folder = where / "llama-8b-shaped"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(folder)
