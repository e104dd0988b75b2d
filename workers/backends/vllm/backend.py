"""vLLM in the worker's process: an AsyncLLM, and vLLM's own HTTP application without a socket.

Only `start` imports vLLM, so that importing this module does not need it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from rsm.broker.settings import Settings
from rsm.workers.backends.base import (
    Backend,
    CallRejected,
    Chunk,
    EngineDied,
    EngineFacts,
    EngineLoad,
    EngineMisconfigured,
    Job,
    Outcome,
)
from rsm.workers.backends.vllm.engine import PROCESS_ENDED, Engine
from rsm.workers.backends.vllm.generate import GenerateCall
from rsm.workers.backends.vllm.openai import PATHS, OpenAICall, ProxyEngineClient
from rsm.workers.backends.vllm.preemption import worst_rank
from rsm.workers.backends.vllm.start.args import TINY_NAME, parse, preempts, prepare_environment
from rsm.workers.backends.vllm.start.failure import failure, misconfigured, require_model
from rsm.workers.backends.vllm.start.output import Output
from rsm.workers.backends.vllm.start.tiny_model import ensure_tiny_model
from rsm.workers.config import EngineConfig
from rsm.workers.meters.rate import RateMeter
from rsm.workers.meters.speed import SpeedMeter, StepWindow
from rsm.workers.scheduling.program import rules_of
from rsm.workers.scheduling.service import create_unit

log = logging.getLogger("rsm.worker")

_NOT_STARTED = "The engine is not running."
_POLL_S = 0.2
_READY_S = 120.0  # for the first answer of an engine process that reports that it is up
_SETTLE_S = 5.0


@dataclass(slots=True)
class _Run:
    job: Job
    call: GenerateCall | OpenAICall
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Meter:
    """A vLLM stat logger, which gets the statistics of every step of the engine."""

    def __init__(self) -> None:
        self.kv_usage = 0.0
        self.rate = RateMeter()
        self.speed = SpeedMeter()
        self.steps = 0
        self._window = StepWindow(self.speed)
        self._busy_since: float | None = None  # the end of the last step, if calls were left then

    def begin(self) -> None:
        """A call is submitted. If the engine was idle, its next step begins now."""
        if self._busy_since is None:
            self._busy_since = time.perf_counter()

    def idle(self) -> None:
        """No call is left. The time from now on does not count as work."""
        self._busy_since = None

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        self.steps += 1
        now = time.perf_counter()
        if iteration_stats is not None:
            self.rate.add(iteration_stats.num_generation_tokens, now)
        if self._busy_since is not None:
            self._window.add(now - self._busy_since, _computed(iteration_stats), _generated(iteration_stats))
        self._busy_since = None
        if scheduler_stats is not None:
            self.kv_usage = scheduler_stats.kv_cache_usage
            if scheduler_stats.num_running_reqs or scheduler_stats.num_waiting_reqs:
                self._busy_since = now
            else:
                self._window.flush()

    def log_engine_initialized(self) -> None:
        """Not used."""

    def log(self) -> None:
        """Not used."""

    def record_sleep_state(self, *_: Any, **__: Any) -> None:
        """Not used."""


def _generated(stats: Any) -> int:
    return stats.num_generation_tokens if stats is not None else 0


def _computed(stats: Any) -> int:
    """Uncached tokens of the prompts that this step completed."""
    tokens = getattr(stats, "prompt_token_stats", None)
    if tokens is not None:
        return int(tokens.computed)
    return int(getattr(stats, "num_prompt_tokens", 0))  # an older vLLM, which counts cached ones too


class VllmBackend(Backend):
    """One vLLM engine.

    The thread that calls `start` must live as long as the engine: when the thread ends, the engine's process is
    stopped.
    """

    def __init__(self, config: EngineConfig, settings: Settings) -> None:
        self._config = config
        self._settings = settings
        self._engine: Engine | None = None
        self._meter = Meter()
        self._runs: dict[str, _Run] = {}
        self._unit = create_unit(settings.service_unit) if preempts(config, settings) else None
        self._rules = rules_of(settings)

    async def start(self) -> EngineFacts:
        """Loads vLLM and the model. Takes seconds to minutes, and blocks the event loop for most of that time.

        Raises:
            EngineMisconfigured: vLLM is missing, or can never start with this configuration.
            EngineDied: it did not start this time.
        """
        require_model(self._config.model)
        prepare_environment(self._config)
        output = Output()
        try:
            with output:
                return await self._start()
        except EngineDied:
            raise
        except Exception as e:
            raise failure(e, output) from e

    async def _start(self) -> EngineFacts:
        vllm = await asyncio.to_thread(_import)
        try:
            args, config = await asyncio.to_thread(self._configure, vllm)
        except EngineDied:
            raise
        except Exception as e:
            raise misconfigured(e) from e
        llm = vllm.AsyncLLM.from_vllm_config(
            vllm_config=config,
            usage_context=vllm.usage,
            stat_loggers=[lambda *_, **__: self._meter],
            enable_log_requests=args.enable_log_requests,
            disable_log_stats=args.disable_log_stats,
        )
        try:
            self._engine = await self._open(vllm, llm, args)
        except BaseException as e:
            await asyncio.shield(asyncio.to_thread(llm.shutdown))
            if isinstance(e, Exception) and not isinstance(e, EngineDied):
                raise EngineDied(f"vLLM failed right after its start: {type(e).__name__}: {e}") from e
            raise
        return self._facts(vllm.version, config)

    def _configure(self, vllm: Any) -> tuple[Any, Any]:
        """vLLM's arguments, and its configuration from them. Reads the model's files."""
        model = self._config.model or str(ensure_tiny_model(self._settings.cache_dir()))
        args = parse(self._config, model, self._settings)
        return args, vllm.AsyncEngineArgs.from_cli_args(args).create_engine_config(vllm.usage)

    async def _open(self, vllm: Any, llm: Any, args: Any) -> Engine:
        tasks = await asyncio.wait_for(llm.get_supported_tasks(), _READY_S)
        engine = Engine.of(llm, self._config.served_name or TINY_NAME)
        engine.app = vllm.build_app(args, tasks, llm.model_config)
        await vllm.init_app_state(ProxyEngineClient(llm), engine.app.state, args, tasks)
        # Its exception handler sets `should_exit` on the server when the engine is dead; there is no server here.
        engine.app.state.server = SimpleNamespace(should_exit=False)
        return engine

    def _facts(self, version: str, config: Any) -> EngineFacts:
        cache = config.cache_config
        return EngineFacts(
            model=self._config.served_name or TINY_NAME,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            kv_tokens=(cache.num_gpu_blocks or 0) * (cache.block_size or 0),
            version=version,
        )

    async def run(self, job: Job, emit: Callable[[Chunk], None]) -> Outcome:
        """Runs one call. `ttft_ms` counts from here; without streaming it is vLLM's own measurement."""
        engine = self._engine
        if engine is None:
            raise EngineDied(_NOT_STARTED)
        if engine.dead:
            raise EngineDied(PROCESS_ENDED)
        if engine.ending:
            await asyncio.sleep(_POLL_S)  # not at once: the call may come back to this engine until it has ended
            return Outcome("abort")
        call: GenerateCall | OpenAICall
        if job.kind == "generate":
            call = GenerateCall(engine, job, emit)
        elif job.kind in PATHS:
            call = OpenAICall(engine, job, emit)
        else:
            raise CallRejected(f"vLLM does not serve {job.kind}; use generate, {', '.join(sorted(PATHS))}.")
        run = self._runs[job.key] = _Run(job, call)
        self._meter.begin()
        try:
            return await call.run()
        finally:
            run.done.set()
            del self._runs[job.key]
            if not self._runs:
                self._meter.idle()

    def abort(self, key: str) -> None:
        if (run := self._runs.get(key)) is not None:
            run.call.abort()

    def load(self) -> EngineLoad:
        """From vLLM's own statistics. An idle engine sends none, and none of its cache is in use."""
        kv_usage = self._meter.kv_usage if self._runs else 0.0
        speed = self._meter.speed
        tokens_per_s = self._meter.rate.per_s(time.perf_counter())
        return EngineLoad(kv_usage, tokens_per_s, speed.speed if speed.measured else None)

    def preemption_threshold(self) -> tuple[int, int] | None:
        if self._unit is None:
            return None
        used = [(run.job, run.call.used()) for run in list(self._runs.values())]
        return worst_rank(used, self._config.max_num_seqs, self._unit, self._rules)

    def progress(self) -> int:
        """Steps of the engine, including those that only prefill a chunk of a prompt."""
        return self._meter.steps

    async def died(self) -> str:
        while True:  # vLLM has no event for its death that outlives its own tasks
            if self._engine is not None and (self._engine.dead or self._engine.ending):
                return PROCESS_ENDED
            await asyncio.sleep(_POLL_S)

    async def stop(self, grace_s: float) -> None:
        """Gives running calls `grace_s` seconds, aborts the rest, and stops vLLM's processes."""
        engine = self._engine
        if engine is None:
            return
        await self._settle(grace_s if not engine.dead else 0.0)
        for run in list(self._runs.values()):
            run.call.abort()
        await self._settle(_SETTLE_S)
        self._engine = None  # its death is no longer reported
        engine.close()
        if (listener := getattr(engine.llm, "output_handler", None)) is not None:
            listener.cancel()  # it would log the end of the engine as an error
        await asyncio.to_thread(partial(_shut_down, engine.llm))
        await asyncio.sleep(0)  # its sockets are closed in the event loop
        with suppress(Exception):  # a failure only causes a warning
            _close_sockets(engine.llm)

    async def _settle(self, timeout_s: float) -> None:
        """Waits until no call is running, at most `timeout_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for run in list(self._runs.values()):
                    await run.done.wait()


def _import() -> Any:
    """Imports the needed parts of vLLM, which takes seconds."""
    try:
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.openai.api_server import build_app, init_app_state
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
    except ModuleNotFoundError as e:
        if e.name != "vllm":
            raise
        raise EngineMisconfigured(
            "vLLM is not installed: pip install 'rsm-engine[vllm]', or choose --backend sim or openai."
        ) from e
    return SimpleNamespace(
        version=vllm.__version__,
        AsyncEngineArgs=AsyncEngineArgs,
        AsyncLLM=AsyncLLM,
        build_app=build_app,
        init_app_state=init_app_state,
        usage=UsageContext.OPENAI_API_SERVER,
    )


def _close_sockets(llm: Any) -> None:
    """Closes the ZeroMQ sockets and contexts that vLLM leaves open."""
    core = llm.engine_core
    for left in list(getattr(core.ctx, "_sockets", ())):  # destroying the context would wait for these forever
        left.close(linger=0)
    core.resources.ctx.destroy(linger=0)


def _shut_down(llm: Any) -> None:
    try:
        llm.shutdown()
    except Exception as e:  # its processes have ended even so
        log.debug("vLLM's shutdown raised %s", type(e).__name__)
