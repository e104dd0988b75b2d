"""The public API, name by name, on a fleet with modelled engines."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from rsm import engine
from rsm.engine import (
    CallCancelled,
    CallFailed,
    Client,
    EngineConfig,
    EngineFailed,
    EngineProcess,
    GlobalProcessTable,
    IllegalTransition,
    KVCacheCoordinator,
    LLMRequest,
    MultiEngineManager,
    RequestLifecycleManager,
    RequestState,
    RsmError,
    SessionManager,
    Settings,
    UnknownCall,
)
from tests.support.sim_processes import processes_of, said, sim
from tests.support.waiting import eventually

# One event loop for the module: the manager in it has one client.
shared = pytest.mark.asyncio(loop_scope="module")

_THRESHOLD = 50
_RESULT = [
    "request_id",
    "session_id",
    "engine_id",
    "text",
    "token_ids",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "finish_reason",
    "latency",
    "waiting_time",
    "ttft",
    "attempts",
]


def fast(**more: Any) -> Settings:
    """Settings without a Redis URL, so the fleet starts its own server."""
    return Settings(redis_url=None, lease_ms=1500, heartbeat_ms=200, tick_ms=100, **more)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def manager() -> AsyncIterator[MultiEngineManager]:
    """Two engines; the second was added before the start."""
    made = MultiEngineManager([sim("e0")], cache_token_threshold=_THRESHOLD, settings=fast(), start_timeout=60)
    made.add_engine(sim("e1"))
    async with made:
        yield made
    assert not processes_of(made.settings), "stop leaves no process"


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(eventually, condition)


def parameters(function: Any) -> dict[str, Any]:
    """Names and defaults, in order, without self and keyword-only parameters."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}


# -- names


@pytest.mark.parametrize(
    "name",
    [
        "MultiEngineManager",
        "EngineConfig",
        "KVCacheCoordinator",
        "RequestLifecycleManager",
        "RequestState",
        "EngineProcess",
        "LLMRequest",
        "SessionManager",
        "GlobalProcessTable",
        "CallCancelled",
        "CallFailed",
        "IllegalTransition",
        "Client",
        "AsyncClient",
    ],
)
def test_everything_is_importable_from_engine(name: str) -> None:
    assert hasattr(engine, name)
    assert name in engine.__all__


def test_signatures() -> None:
    none = inspect.Parameter.empty
    call = {
        "session_id": none,
        "prompt": none,
        "sampling_params": None,
        "priority": 0,
        "request_id": None,
        "deadline": None,
    }
    assert parameters(MultiEngineManager) == {
        "engine_configs": (),
        "cache_token_threshold": None,
        "redis_url": None,
    }
    assert parameters(MultiEngineManager.submit_request) == call
    assert parameters(MultiEngineManager.stream_request) == call
    assert parameters(MultiEngineManager.remove_engine) == {"engine_id": none, "drain": True}
    assert parameters(EngineProcess.get_result) == {"timeout": 1.0}
    for synchronous in ("add_engine", "remove_engine", "start", "stop", "get_engine_status", "get_stats"):
        assert not inspect.iscoroutinefunction(getattr(MultiEngineManager, synchronous))
    for coroutine in ("submit_request", "cancel_request", "cancel_session"):
        assert inspect.iscoroutinefunction(getattr(MultiEngineManager, coroutine))
    assert inspect.isasyncgenfunction(MultiEngineManager.stream_request)


def test_engine_config() -> None:
    assert EngineConfig(engine_id="e", model="m").model_dump() == {
        "engine_id": "e",
        "model": "m",
        "gpu_id": 0,
        "tensor_parallel_size": 1,
        "max_model_len": None,
        "max_num_seqs": 256,
        "trust_remote_code": False,
        "dtype": "auto",
        "backend": "vllm",
        "engine_args": {},
        "base_url": None,
        "api_key": None,
        "served_model_name": None,
        "engine_scheduler": None,
    }
    remote = EngineConfig(engine_id="e", model="m", backend="openai", base_url="http://host:8000/v1")
    assert remote.base_url == "http://host:8000/v1"
    for wrong in ({"backend": "openai"}, {"backend": "nope"}, {"gpus": 2}, {"engine_id": "a b"}, {"max_num_seqs": 0}):
        with pytest.raises(ValueError, match="validation error"):
            EngineConfig(**{"engine_id": "e", **wrong})


def test_the_scheduler_is_set_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    fcfs = Settings(engine_scheduler="fcfs")
    monkeypatch.setenv("RSM_ENGINE_SCHEDULER", "priority")
    assert EngineConfig(engine_id="e", engine_scheduler="plas").scheduler(fcfs) == "plas"
    assert EngineConfig(engine_id="e").scheduler(fcfs) == "fcfs", "the settings given, not those of the environment"
    for name in ("scheduler-cls", "scheduling_policy", "--scheduler-cls"):
        assert EngineConfig(engine_id="e", engine_args={name: "x"}).engine_scheduler is None
        with pytest.raises(ValueError, match=f"engine_scheduler=plas and {name} in engine_args contradict"):
            EngineConfig(engine_id="e", engine_scheduler="plas", engine_args={name: "x"})
    with pytest.raises(ValueError, match="a remote server orders its calls itself"):
        EngineConfig(engine_id="e", backend="openai", base_url="http://h/v1", engine_scheduler="plas")
    with pytest.raises(ValueError, match="'fcfs', 'priority' or 'plas'"):
        EngineConfig(engine_id="e", engine_scheduler="fifo")


def test_request_states() -> None:
    assert list(RequestState) == ["PENDING", "RUNNING", "COMPLETED", "CANCELLED", "FAILED"]


# -- MultiEngineManager


@shared
async def test_submit_gives_a_future_at_once(manager: MultiEngineManager) -> None:
    future = await manager.submit_request("s1", "Explain quantum computing", sampling_params={"max_tokens": 60})
    assert isinstance(future, asyncio.Future)
    assert not future.done()
    result = await future
    assert await future is result, "it may be awaited again"
    assert [name for name in _RESULT if not hasattr(result, name)] == []
    assert (result.session_id, result.text) == ("s1", said("Explain quantum computing", 60))
    assert result.engine_id in ("e0", "e1")
    assert (len(result.token_ids), result.completion_tokens, result.finish_reason) == (60, 60, "length")
    assert (result.prompt_tokens > 0, result.cached_tokens, result.attempts) == (True, 0, 1)
    assert result.ttft is not None
    assert 0 <= result.waiting_time <= result.ttft <= result.latency


@shared
async def test_id_priority_and_deadline(manager: MultiEngineManager) -> None:
    future = await manager.submit_request("s1", [1, 2, 3], {"max_tokens": 2}, 5, "mine", 30.0)
    assert (await future).request_id == "mine"
    again = await manager.submit_request("s1", [1, 2, 3], {"max_tokens": 2}, 5, "mine", 30.0)
    assert (await again) == (await future), "the same push again is the same call"
    late = await manager.submit_request("s1", "x", {"max_tokens": 5000}, deadline=0.3)
    with pytest.raises(CallFailed) as failed:
        await late
    assert (failed.value.error_code, failed.value.record.state) == ("deadline_exceeded", RequestState.FAILED)
    assert said("x", 5000).startswith(failed.value.partial_text)
    assert failed.value.partial_text


@shared
async def test_stream(manager: MultiEngineManager) -> None:
    deltas = [d async for d in manager.stream_request("s1", "stream", sampling_params={"max_tokens": 12})]
    assert "".join(d.text for d in deltas) == said("stream", 12)
    assert len([i for d in deltas for i in d.token_ids]) == 12


@shared
async def test_cancel_request(manager: MultiEngineManager) -> None:
    heard: list[str] = []
    begun = asyncio.Event()

    async def read() -> None:
        async for delta in manager.stream_request("s1", "stop me", {"max_tokens": 5000}, request_id="stopped"):
            heard.append(delta.text)  # a comprehension would drop what came before the exception
            begun.set()

    reading = asyncio.create_task(read())
    await begun.wait()
    assert await manager.cancel_request("stopped") is True
    with pytest.raises(CallCancelled) as cancelled:
        await reading
    assert (cancelled.value.record.request_id, cancelled.value.record.state) == ("stopped", RequestState.CANCELLED)
    assert cancelled.value.partial_text == "".join(heard)
    assert await manager.cancel_request("stopped") is True, "it may be repeated"
    future = await manager.submit_request("s1", "me too", {"max_tokens": 5000}, request_id="stopped2")
    assert await manager.cancel_request("stopped2", reason="enough") is True
    with pytest.raises(CallCancelled, match="enough"):
        await future


@shared
async def test_cancel_session(manager: MultiEngineManager) -> None:
    futures = [await manager.submit_request("doomed", f"x{i}", {"max_tokens": 5000}) for i in range(6)]
    other = await manager.submit_request("spared", "x", {"max_tokens": 5})
    assert await manager.cancel_session("doomed") == 6
    ends = await asyncio.gather(*futures, return_exceptions=True)
    assert all(isinstance(e, CallCancelled) for e in ends)
    assert (await other).session_id == "spared"
    assert await manager.cancel_session("doomed") == 0


@shared
async def test_long_calls_of_a_session_stay_together(manager: MultiEngineManager) -> None:
    """Even if its engine is the busier one."""
    prompt = list(range(4 * _THRESHOLD))
    first = await (await manager.submit_request("loyal", prompt, {"max_tokens": 2}))
    busy = [await manager.submit_request("loyal", prompt, {"max_tokens": 400}) for _ in range(2)]
    third = await (await manager.submit_request("loyal", prompt, {"max_tokens": 2}))
    assert third.engine_id == first.engine_id
    assert third.cached_tokens > 0
    assert await manager.cancel_session("loyal") == 2
    await asyncio.gather(*busy, return_exceptions=True)
    assert {future.exception().record.engine_id for future in busy} == {first.engine_id}  # type: ignore[union-attr]
    assert manager.get_stats()["hit_rate"] > 0


@shared
async def test_status_and_stats(manager: MultiEngineManager) -> None:
    done = await (await manager.submit_request("s1", "x", {"max_tokens": 2}))
    status = manager.get_engine_status(done.engine_id)
    assert (status["state"], status["running"], status["queued"]) == ("READY", 0, 0)
    assert {"tokens_per_s", "kv_usage"} <= status.keys()
    stats = manager.get_stats()
    assert set(stats["engines"]) >= {"e0", "e1"}
    assert stats["completed"] >= 1
    assert (stats["unaccounted"], stats["pending"], stats["running"]) == (0, 0, 0)
    assert {"submitted", "cancelled", "failed", "hit_rate", "mean_waiting_s", "mean_running_s"} <= stats.keys()
    with pytest.raises(UnknownCall, match="no engine nix"):
        manager.get_engine_status("nix")


@shared
async def test_engines_come_and_go_while_calls_run(manager: MultiEngineManager) -> None:
    await asyncio.to_thread(manager.add_engine, sim("e2"))
    assert manager.get_engine_status("e2")["state"] == "READY"
    with pytest.raises(EngineFailed, match="already part of this fleet"):
        manager.add_engine(sim("e2"))

    futures = [await manager.submit_request(f"s{i}", f"x{i}", {"max_tokens": 60}) for i in range(9)]
    await until(lambda: manager.get_engine_status("e2")["running"])
    await asyncio.to_thread(manager.remove_engine, "e2")  # with drain: its calls finish first
    results = await asyncio.gather(*futures)
    assert "e2" in {r.engine_id for r in results}
    assert {r.attempts for r in results} == {1}
    assert manager.get_engine_status("e2")["state"] == "STOPPED"

    await asyncio.to_thread(manager.add_engine, sim("e3"))
    futures = [await manager.submit_request(f"s{i}", f"x{i}", {"max_tokens": 100}) for i in range(9)]
    await until(lambda: manager.get_engine_status("e3")["running"])
    await asyncio.to_thread(manager.remove_engine, "e3", drain=False)  # others run its calls again
    results = await asyncio.gather(*futures)
    assert "e3" not in {r.engine_id for r in results}
    assert {r.attempts for r in results} == {1, 2}
    assert [r.text for r in results] == [said(f"x{i}", 100) for i in range(9)]
    with pytest.raises(EngineFailed, match="not part of this fleet"):
        manager.remove_engine("e3")


async def test_start_and_stop_with_an_external_redis_and_another_policy(settings: Settings) -> None:
    round_robin = settings.model_copy(update={"redis_url": None, "policy": "round_robin"})
    manager = MultiEngineManager(
        engine_configs=[sim("r0", instant=True), sim("r1", instant=True), sim("r2", instant=True)],
        redis_url=settings.url(),
        settings=round_robin,
        start_timeout=60,
    )
    manager.remove_engine("r2")
    with pytest.raises(RsmError, match="start"):
        await manager.submit_request("s", "x")
    manager.start()
    try:
        results = [await (await manager.submit_request("s", "x")) for _ in range(6)]
        assert Counter(r.engine_id for r in results) == {"r0": 3, "r1": 3}
        assert manager.settings.url() == settings.url()
    finally:
        manager.stop()
    assert not processes_of(settings)
    await asyncio.sleep(0)  # called inside the loop, `stop` could only schedule the close of the client
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 10)  # the tasks of its client end


def test_an_engine_that_does_not_start_leaves_nothing(settings: Settings) -> None:
    manager = MultiEngineManager([sim("good"), sim("bad", nonsense=1)], settings=settings, start_timeout=60)
    why = r"Engine bad did not start: engine_args of bad do not fit backend sim: .*nonsense"
    with pytest.raises(EngineFailed, match=why):
        manager.start()
    assert not processes_of(settings)


# -- EngineProcess


@pytest.fixture(scope="module")
def alone() -> Iterator[EngineProcess]:
    process = EngineProcess(sim("alone"), settings=fast(), start_timeout=60)
    process.start()
    yield process
    process.stop()


def test_engine_process(alone: EngineProcess) -> None:
    assert alone.get_result(timeout=0.01) is None
    alone.submit_request(LLMRequest("r1", "s1", "hello", {"max_tokens": 5}))
    result = alone.get_result(timeout=20)
    assert result is not None
    assert (result.request_id, result.session_id, result.engine_id) == ("r1", "s1", "alone")
    assert result.text == said("hello", 5)

    alone.submit_request(
        LLMRequest(request_id="r2", session_id="s1", prompt="stop me", sampling_params={"max_tokens": 5000})
    )
    assert alone.cancel_request("r2") is True
    with pytest.raises(CallCancelled) as cancelled:
        alone.get_result(timeout=20)
    assert cancelled.value.record.request_id == "r2"
    assert alone.cancel_request("r2") is True, "it may be repeated"
    assert "secret" not in repr(LLMRequest("r", "s", "secret"))


def test_engine_process_must_be_started() -> None:
    with pytest.raises(RsmError, match="start"):
        EngineProcess(sim("never"), redis_url="unix:///tmp/nobody").submit_request(LLMRequest("r", "s", "x"))


# -- views of Redis, which they find through the environment


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("environment")
def test_kv_cache_coordinator() -> None:
    coordinator = KVCacheCoordinator(cache_token_threshold=2048)
    assert coordinator.get_best_engine_for_session("s1", ["e0", "e1"], 4000) is None, "nothing is cached yet"
    coordinator.record_cache_usage("s1", "e1", 4000)
    coordinator.record_cache_usage("s1", "e0", 100)
    assert coordinator.get_best_engine_for_session("s1", ["e0", "e1"], 4000) == "e1"
    assert coordinator.get_best_engine_for_session("s1", ["e0"], 4000) == "e0"
    assert coordinator.get_best_engine_for_session("s1", ["e2"], 4000) is None
    assert coordinator.get_best_engine_for_session("s1", ["e0", "e1"], 2048) is None, "short: any will do"
    stats = coordinator.get_cache_stats()
    assert (stats["affinity_hits"], stats["affinity_misses"], stats["hit_rate"]) == (2, 2, 0.5)
    assert KVCacheCoordinator().cache_token_threshold == 2048


@pytest.mark.usefixtures("environment")
def test_request_lifecycle_manager(client: Client) -> None:
    lifecycle = RequestLifecycleManager()
    metadata = lifecycle.start_request("r1", "s1", "e1")
    assert (metadata.request_id, metadata.session_id, metadata.engine_id) == ("r1", "s1", "e1")
    assert metadata.state is RequestState.PENDING
    assert metadata.get_waiting_time() >= 0
    assert lifecycle.update_request_state("r1", RequestState.RUNNING).state is RequestState.RUNNING
    with pytest.raises(IllegalTransition, match="r1"):
        lifecycle.start_request("r1", "s1", "e1")
    with pytest.raises(IllegalTransition):
        lifecycle.update_request_state("r1", RequestState.PENDING)
    assert [m.request_id for m in lifecycle.get_session_requests("s1")] == ["r1"]
    assert [m.request_id for m in lifecycle.get_running_requests()] == ["r1"]
    done = lifecycle.update_request_state("r1", RequestState.COMPLETED)
    assert done.state is RequestState.COMPLETED
    assert done.get_total_time() >= done.get_execution_time() >= 0
    for state in (RequestState.RUNNING, RequestState.FAILED):
        with pytest.raises(IllegalTransition, match=f"COMPLETED and cannot become {state}"):
            lifecycle.update_request_state("r1", state)
    assert lifecycle.get_running_requests() == []

    lifecycle.start_request("r2", "s1", "e1")
    assert lifecycle.cancel_request("r2", reason="never mind") is True
    assert lifecycle.cancel_request("r2") is True, "it may be repeated"
    assert client.record("r2").error == "never mind"
    assert {m.request_id for m in lifecycle.get_session_requests("s1")} == {"r1", "r2"}
    with pytest.raises(UnknownCall):
        lifecycle.update_request_state("nix", RequestState.RUNNING)


@pytest.mark.usefixtures("environment")
def test_sessions_and_the_process_table() -> None:
    table = GlobalProcessTable()
    sessions = SessionManager(table)
    first = sessions.start_session()
    assert table.get(first)["service"] == 0
    assert table.update_program_metrics(first, "c1", service_time=120.0, waiting_time=0.5) == 120
    table.update_program_metrics(first, "c2", 30.0, 0.25)
    entry = table.get(first)
    assert (entry["session_id"], entry["service"], entry["waited_ms"]) == (first, 150, 750)
    with SessionManager(table) as second:
        assert [p["session_id"] for p in table.programs()] == [first, second], "most attained service first"
    with pytest.raises(RsmError, match="already exists"):
        sessions.start_session(first)
    assert sessions.end_session(first) is True
    with pytest.raises(UnknownCall):
        table.get(first)
    assert table.programs() == []
