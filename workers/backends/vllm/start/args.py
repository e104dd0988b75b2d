"""Turns an EngineConfig into vLLM's own arguments and environment."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
from difflib import get_close_matches
from typing import Any

from rsm.broker.settings import Settings
from rsm.workers.backends.base import EngineMisconfigured
from rsm.workers.backends.vllm.guard import CONFIG_KEY, FACTORY, PLAS, SCHEDULER
from rsm.workers.backends.vllm.start.gpus import on_gpu, visible_gpus
from rsm.workers.config import EngineConfig
from rsm.workers.scheduling.program import as_config

TINY_NAME = "tiny-llama"

# The location of this module in vLLM 0.20, 0.32 and 0.33.
_PARSER_MODULES = ("common", "launchers", "openai")
_CPU_KV_BYTES = 256 << 20
_CPU_BATCHED_TOKENS = 2048
_CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # with more threads than cores, every token waits for the slowest
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model runs inside EngineCore, which saves a process
    "TORCH_COMPILE_DISABLE": "1",
}


def prepare_environment(config: EngineConfig) -> None:
    """Sets the environment variables that torch and vLLM read when they are imported.

    Raises:
        EngineMisconfigured: the machine has fewer GPUs than the engine needs.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if on_gpu():
        # A fork would inherit this process's Redis connections, and locks that its threads hold.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ["CUDA_VISIBLE_DEVICES"] = _devices(config.gpu_id, config.tensor_parallel_size)
        return
    for name, value in _CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _devices(first: int, count: int) -> str:
    """The value of CUDA_VISIBLE_DEVICES for `count` GPUs, counted among those that this process can see.

    Raises:
        EngineMisconfigured: there are too few.
    """
    visible = visible_gpus()
    chosen = visible[first : first + count]
    if len(chosen) < count:
        wanted = f"GPU {first}" if count == 1 else f"GPUs {first} to {first + count - 1}"
        there = f"{len(visible)} here, counted from 0" if visible else "none here"
        raise EngineMisconfigured(
            f"The engine needs {wanted}, and there {'is' if len(visible) == 1 else 'are'} {there}. "
            "Choose another (gpu_id, --gpu), start fewer engines, or let them share one: docs/operations.md, GPUs."
        )
    return ",".join(chosen)


def parse(config: EngineConfig, model: str, settings: Settings) -> Any:
    """Parses vLLM's engine and server arguments.

    Raises:
        EngineMisconfigured: vLLM does not accept an argument; the message names it.
    """
    parser, check = _parser()
    asked = {name.lstrip("-").replace("-", "_"): value for name, value in config.engine_args.items()}
    unknown = [name for name in asked if f"--{name.replace('_', '-')}" not in parser._option_string_actions]
    if unknown:
        options = {option.lstrip("-").replace("-", "_"): None for option in parser._option_string_actions}
        close = [match for name in unknown for match in get_close_matches(name, options, 1)]
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise EngineMisconfigured(f"vLLM {_version()} has no argument {', '.join(unknown)}.{hint}")
    by_default = defaults(config, model, parser._option_string_actions)
    line = command_line({**by_default, **_scheduler(config, asked, settings), **asked})

    def refuse(message: str) -> None:
        raise EngineMisconfigured(f"vLLM does not accept its arguments: {message}")

    parser.error = refuse  # argparse would exit the process
    args = parser.parse_args(line)
    try:
        check(args)
    except (TypeError, ValueError) as e:
        refuse(str(e))
    return args


def _parser() -> tuple[Any, Any]:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for where in _PARSER_MODULES:
        try:
            module = importlib.import_module(f"vllm.entrypoints.{where}.cli_args")
        except ModuleNotFoundError:
            continue
        check = getattr(module, "validate_parsed_serve_args", lambda _: None)
        return module.make_arg_parser(FlexibleArgumentParser()), check
    raise EngineMisconfigured(
        f"vLLM {_version()} is not supported: its argument parser was not found. Install a supported version: "
        "pip install 'rsm-engine[vllm]'."
    )


def preempts(config: EngineConfig, settings: Settings) -> bool:
    """Whether the engine runs the plas scheduler, which preempts running calls for better ones."""
    asked = {name.lstrip("-").replace("-", "_") for name in config.engine_args}
    return config.scheduler(settings) == "plas" and not asked & {"scheduler_cls", "scheduling_policy"}


def _scheduler(config: EngineConfig, asked: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The scheduler arguments. guard.py creates every scheduler, so that the engine dies with its worker."""
    own = asked.pop("scheduler_cls", None) or ""
    named = own if isinstance(own, str) else f"{own.__module__}.{own.__qualname__}"
    ours = {SCHEDULER: PLAS if preempts(config, settings) else named, "settings": as_config(settings)}
    further = asked.pop("additional_config", None) or {}
    policy = "fcfs" if config.scheduler(settings) == "fcfs" and not named else "priority"
    return {
        "scheduling_policy": policy,
        "scheduler_cls": FACTORY,
        "additional_config": {**further, CONFIG_KEY: {**ours, **further.get(CONFIG_KEY, {})}},
    }


def defaults(config: EngineConfig, model: str, known: Any) -> dict[str, Any]:
    """Default arguments, without those that this version of vLLM does not have."""
    tiny = not config.model
    found: dict[str, Any] = {
        "model": model,
        "served_model_name": [config.served_name or TINY_NAME],
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "trust_remote_code": config.trust_remote_code or None,
        "dtype": config.dtype,
        "enable_prefix_caching": True,
        "disable_log_stats": True,  # the monitor shows these numbers, and `Meter` gets them in any case
    }
    if tiny:
        tools = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "tool_strict_level": "parameter"}
        found |= {name: value for name, value in tools.items() if f"--{name.replace('_', '-')}" in known}
    if not on_gpu():
        found |= _cpu_defaults(config, tiny)
    return found


def _cpu_defaults(config: EngineConfig, tiny: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "enforce_eager": True,
        "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, config.max_num_seqs),
    }
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        found["kv_cache_memory_bytes"] = _CPU_KV_BYTES
    if tiny and config.dtype == "auto":
        found["dtype"] = "float32"
    return found


def command_line(arguments: dict[str, Any]) -> list[str]:
    """The arguments as a command line: flags for booleans, JSON for objects, nothing for None."""
    line: list[str] = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            line.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, (list, tuple)):
            line += [flag, *(_text(item) for item in value)]
        elif value is not None:
            line.append(f"{flag}={_text(value)}")
    return line


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _version() -> str:
    import vllm

    return str(vllm.__version__)
