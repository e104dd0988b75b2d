"""The systems that are compared: public routers, and ours with the same engines and with its own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from subprocess import Popen
from typing import IO, Any

import httpx

from bench.http_servers import MODEL, HttpServer, router, sglang_router, vllm_router
from bench.programs.live.replay import Answer, Serve
from bench.programs.live.samples import ENGINES, KV_TOKENS, SLOTS, STOCK, TIMES
from bench.programs.systems import OURS as OURS_FOR_PROGRAMS
from bench.venvs import version_of
from rsm.broker import AsyncClient, Settings
from rsm.broker.protocol.ids import new_id
from rsm.engine.fleet import Fleet
from rsm.workers.backends.sim.text import token_text, tokenize
from rsm.workers.config import EngineConfig

# Longer than any run, so that an answer is late but never missing.
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Stage:
    """What all systems share: a Redis, the engines' servers, and a log for their processes.

    Attributes:
        policy: policy of our routers.
    """

    redis_url: str
    servers: Sequence[HttpServer]
    log: IO[bytes]
    policy: str


@dataclass(frozen=True, slots=True)
class Running:
    """A running system. `pids`: its processes between the producer and the engines' servers."""

    serve: Serve
    pids: Sequence[int]


@dataclass(frozen=True, slots=True)
class System:
    """One line of the comparison. The page shows the version of `package` in the environment `venv` ("": this one)."""

    name: str
    mode: str
    package: str
    venv: str
    run: Callable[[Stage], AbstractAsyncContextManager[Running]]
    ours: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, {self.mode}"

    def version(self) -> str:
        return version_of(self.package, self.venv)


def text_of(ids: Sequence[int]) -> str:
    """Returns a text that modelled engines read as exactly these tokens."""
    return "".join(map(token_text, ids))


# -- ours


def settings(stage: Stage) -> Settings:
    """Returns the settings for programs; those that count tokens are divided by ten, like the programs' lengths."""
    found = Settings(namespace=f"peers-{new_id()}", drain_grace_s=0, policy=stage.policy, **OURS_FOR_PROGRAMS.settings)
    bounds = tuple(b // 10 for b in found.level_bounds)
    changes = {"level_bounds": bounds, "cache_token_threshold": found.cache_token_threshold // 10}
    return found.model_copy(update=changes).with_redis(stage.redis_url)


@asynccontextmanager
async def _ours(stage: Stage, configs: Sequence[EngineConfig]) -> AsyncIterator[Running]:
    fleet = Fleet(settings(stage), output=stage.log.fileno())
    fleet.start(configs)
    try:
        async with AsyncClient(settings=fleet.settings) as client:
            processes = [*fleet.routers, *fleet.workers.values()]
            yield Running(through_broker(client), [p.pid for p in processes if p.pid is not None])
    finally:
        fleet.stop()


def ours_before_servers(stage: Stage) -> AbstractAsyncContextManager[Running]:
    """Runs an `openai` worker in front of each server."""
    return _ours(stage, [_engine(n, backend="openai", base_url=f"{s.url}/v1") for n, s in enumerate(stage.servers)])


def ours_inside(stage: Stage) -> AbstractAsyncContextManager[Running]:
    """Runs workers with the same engines inside, and our scheduler in these engines."""
    args = {**STOCK, "scheduler": OURS_FOR_PROGRAMS.scheduler}
    return _ours(stage, [_engine(n, backend="sim", engine_args=args) for n in range(ENGINES)])


def _engine(number: int, **more: Any) -> EngineConfig:
    return EngineConfig(engine_id=f"e{number}", model=MODEL, max_num_seqs=SLOTS, **more)


def through_broker(client: AsyncClient) -> Serve:
    async def serve(program: str, prompt: list[int], tokens: int) -> Answer:
        body = {"prompt": text_of(prompt), "max_tokens": tokens}
        call = await client.submit(body, kind="completions", session=program, prompt_tokens=len(prompt))
        result = await call.result(_TIMEOUT_S)
        return Answer(tokenize(result.text), result.cached_tokens, result.waiting_time)

    return serve


# -- over HTTP


# Headers and more body fields that tell a router which program a call belongs to.
Identity = Callable[[str], tuple[Mapping[str, str], Mapping[str, Any]]]


def header(name: str) -> Identity:
    return lambda program: ({name: program}, {})


def anonymous(program: str) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    return {}, {}


def agentic_context(program: str) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    return {}, {"vllm_xargs": {"agentic_context": {"program_id": program, "session_id": program}}}


@asynccontextmanager
async def over_http(url: str, identity: Identity = anonymous) -> AsyncIterator[Serve]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits) as client:

        async def serve(program: str, prompt: list[int], tokens: int) -> Answer:
            headers, more = identity(program)
            body = {"model": MODEL, "prompt": text_of(prompt), "max_tokens": tokens, **more}
            reply = await client.post("/v1/completions", json=body, headers=headers)
            reply.raise_for_status()
            document = reply.json()
            usage = document["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            return Answer(tokenize(document["choices"][0]["text"]), cached, 0.0)

        yield serve


def _peer(
    command: Callable[[], Sequence[str]], identity: Identity
) -> Callable[[Stage], AbstractAsyncContextManager[Running]]:
    @asynccontextmanager
    async def run(stage: Stage) -> AsyncIterator[Running]:
        with router(command(), stage.servers, stage.log) as found:
            async with over_http(found.url, identity) as serve:
                yield Running(serve, [pid_of(found.process)])

    return run


def pid_of(process: Popen[bytes]) -> int:
    return process.pid


def program_scheduling() -> list[str]:
    """Returns vllm-router's options for program scheduling, with the engines' own figures for its calibration.

    It models a step's time as a + b x calls + c x context tokens, and a prefill's as a + b x thousands of tokens.
    """
    config = {
        "global_queue": True,  # "the recommended deployment mode"
        "token_capacity_per_target": KV_TOKENS,
        "max_active_programs_per_target": 64,
        "prefill_cost_model": {
            "intercept_seconds": TIMES.step_s,
            "linear_seconds_per_1k_tokens": TIMES.prefill_token_s * 1000,
            "quadratic_seconds_per_1k_tokens_squared": 0.0,
            "decode_throughput_alpha": 0.15,
        },
        "decode_throughput_model": {
            "fixed_step_seconds": TIMES.step_s,
            "batch_step_seconds_per_request": TIMES.decode_seq_s,
            "context_step_seconds_per_token": TIMES.context_token_s,
        },
    }
    return ["--enable-program-scheduling", "--program-scheduling-config-json", json.dumps(config)]


def _vllm(mode: str, policy: str, identity: Identity, options: Callable[[], Sequence[str]] = list) -> System:
    run = _peer(lambda: [*vllm_router(policy), *options()], identity)
    return System("vllm-router", mode, "vllm-router", "vllm-router", run)


def _sglang(policy: str, identity: Identity) -> System:
    run = _peer(lambda: sglang_router(policy), identity)
    return System("sglang-router", policy, "sglang-router", "sglang-router", run)


PEERS = (
    _vllm("consistent_hash", "consistent_hash", header("X-Session-ID")),
    _vllm("cache_aware", "cache_aware", anonymous),
    _vllm("program scheduling", "consistent_hash", agentic_context, program_scheduling),
    _sglang("cache_aware", anonymous),
    _sglang("manual", header("X-SMG-Routing-Key")),
)
OURS = (
    System("rsm-engine", "in front of the same servers", "rsm-engine", "", ours_before_servers, ours=True),
    System("rsm-engine", "with its own engines", "rsm-engine", "", ours_inside, ours=True),
)
SYSTEMS = (*OURS, *PEERS)
