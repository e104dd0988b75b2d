"""Engine loss with real processes: a call that kills engines, its neighbours, and `on_engine_loss`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rsm.broker import AsyncClient, CallFailed, Client, Delta, RequestState, Settings
from rsm.broker.protocol.models import CallRecord, OnEngineLoss
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.monitor import Monitor
from rsm.engine.fleet import Fleet
from rsm.workers.config import EngineConfig
from tests.support.fake_worker import routing
from tests.support.sim_http import sim_server
from tests.support.sim_processes import (
    Start,
    WorkerProcess,
    all_speak,
    assert_undisturbed,
    sim,
    state_of,
    submit_streams,
)
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(240)

_ENGINES = ("e0", "e1")
_TOKENS = 60
_STEP_S = 0.02


# -- poison


@pytest.mark.parametrize("hard", [True, False], ids=["its process dies", "its engine core dies"])
def test_poison_is_found_and_its_neighbours_complete(settings: Settings, client: Client, hard: bool) -> None:
    fleet = Fleet(settings)
    try:
        fleet.start([sim(e, step_s=_STEP_S, die_on="arsenic", die_hard=hard) for e in _ENGINES], 60)
        neighbours = submit_streams(client, 10, _TOKENS)
        eventually(lambda: all_speak(client, list(neighbours.values())))
        poison = client.submit("a cup of arsenic", id="poison", max_tokens=_TOKENS)
        record = poison.wait(120)
        assert (record.state, record.error_code) == (RequestState.FAILED, "attempts_exhausted")
        assert f"{settings.max_deaths} engine processes" in record.error
        found = client.record("poison")
        assert (found.deaths, found.failures, found.attempt) == (settings.max_deaths, 0, settings.max_deaths)
        assert [letter.request_id for letter in DeadLetters(settings).ls()] == ["poison"]
        for prompt, handle in neighbours.items():
            handle.result(120)
            assert_undisturbed(client, handle.id, prompt, _TOKENS)
            assert client.record(handle.id).failures == 0
        monitor = Monitor(settings)
        eventually(lambda: all(state_of(monitor, e) == "READY" for e in _ENGINES), 60)
        assert sum(worker.restarts for worker in fleet.workers.values()) == settings.max_deaths
        after = submit_streams(client, 10, 2)
        assert all(handle.result(60).attempts == 1 for handle in after.values()), "the engines serve as before"
    finally:
        fleet.stop()


# -- continue, restart, fail

_CHAT = {"messages": [{"role": "user", "content": "Explain it"}], "max_tokens": 500}
# A remote server cannot resume a chat with log probabilities; a modelled engine ignores them.
_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("generate", {"prompt": "Explain quantum computing", "max_tokens": 500}),
    ("chat.completions", _CHAT),
    ("chat.completions", _CHAT | {"logprobs": True}),
]
_CHOICES: tuple[OnEngineLoss, ...] = ("continue", "restart", "fail")


@dataclass
class Followed:
    """One streamed call and what its reader saw."""

    kind: str
    body: dict[str, Any]
    choice: OnEngineLoss
    chunks: list[Delta] = field(default_factory=list)
    record: CallRecord | None = None

    def text(self, chunks: list[Delta]) -> str:
        return "".join(p.text for p in chunks) + "".join(_said(chunk) for p in chunks for chunk in p.chunks)

    def check(self, whole: str, resumable: bool) -> None:
        """Checks its end after its engine died. `whole`: the text of an undisturbed call."""
        record = self.record
        assert record is not None
        assert [p.n for p in self.chunks] == list(range(len(self.chunks)))
        assert (record.deaths, record.failures) == (0 if self.choice == "fail" else 1, 0)
        marks = [i for i, p in enumerate(self.chunks) if p.restart]
        assert len(marks) == (self.choice == "restart")
        if self.choice == "fail" or not resumable:
            assert record.state is RequestState.FAILED
            assert record.error_code == ("engine_lost" if self.choice == "fail" else "invalid_request")
            assert self.choice == "fail" or 'on_engine_loss="restart"' in record.error
            assert self.text(self.chunks), "the partial text can still be read"
            assert whole.startswith(self.text(self.chunks))
            return
        assert record.state is RequestState.COMPLETED
        assert record.result is not None
        begin = marks[0] + 1 if marks else 0
        assert whole.startswith(self.text(self.chunks[:begin]))
        assert self.text(self.chunks[begin:]) == record.result.text == whole


def _said(chunk: str) -> str:
    choices = json.loads(chunk)["choices"]
    return str((choices[0].get("delta") or {}).get("content") or "") if choices else ""


@pytest.fixture
def remote() -> Iterator[str]:
    """A remote OpenAI-compatible server that outlives its worker."""
    with sim_server() as server:
        yield f"{server.url}/v1"


@pytest.fixture
def start_engine(start: Start, request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> Iterator[Any]:
    """Starts workers of one backend."""
    if request.param == "sim":
        yield lambda engine_id: start(engine_id)
        return
    url, started = request.getfixturevalue("remote"), []

    def openai(engine_id: str) -> WorkerProcess:
        config = EngineConfig(engine_id=engine_id, backend="openai", base_url=url, model="m", max_num_seqs=64)
        started.append(WorkerProcess(config, settings, tmp_path / f"{engine_id}.log"))
        eventually(lambda: state_of(Monitor(settings), engine_id) == "READY", what=started[-1].log())
        return started[-1]

    yield openai
    for worker in started:
        worker.kill()


@pytest.mark.parametrize("start_engine", ["sim", "openai"], indirect=True)
async def test_each_call_ends_as_its_on_engine_loss_says(
    settings: Settings, client: Client, start_engine: Callable[[str], WorkerProcess], request: pytest.FixtureRequest
) -> None:
    remote = "openai" in request.node.name
    worker = await asyncio.to_thread(start_engine, "e1")
    with routing(settings), ThreadPoolExecutor(len(_CALLS) * len(_CHOICES)) as threads:
        async with AsyncClient(settings=settings) as aclient:
            calls = [Followed(*call, choice) for call in _CALLS for choice in _CHOICES]
            pushed = [Followed(*call, choice) for call in _CALLS for choice in _CHOICES]
            following: list[asyncio.Future[None]] = [asyncio.create_task(_follow(aclient, c)) for c in calls]
            loop = asyncio.get_running_loop()
            following += [loop.run_in_executor(threads, _follow_sync, client, c) for c in pushed]
            await asyncio.to_thread(eventually, lambda: all(len(c.chunks) > 5 for c in calls + pushed))
            worker.kill()
            await asyncio.to_thread(start_engine, "e2")
            async with asyncio.timeout(60):
                await asyncio.gather(*following)
            undisturbed = [await aclient.submit(body, kind=kind) for kind, body in _CALLS]
            whole = {kind: (await call).text for (kind, _), call in zip(_CALLS, undisturbed, strict=True)}
            for call in calls + pushed:
                resumable = call.choice == "restart" or not (remote and "logprobs" in call.body)
                call.check(whole[call.kind], resumable)


async def _follow(client: AsyncClient, call: Followed) -> None:
    handle = await client.submit(call.body, kind=call.kind, stream=True, on_engine_loss=call.choice)
    try:
        async for delta in handle.stream():
            call.chunks.append(delta)
    except CallFailed:
        pass  # its record has the error
    call.record = await client.record(handle.id)


def _follow_sync(client: Client, call: Followed) -> None:
    handle = client.submit(call.body, kind=call.kind, stream=True, on_engine_loss=call.choice)
    try:
        for delta in handle.stream():
            call.chunks.append(delta)
    except CallFailed:
        pass  # its record has the error
    call.record = handle.record()
