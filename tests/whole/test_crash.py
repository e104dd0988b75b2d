"""kill -9 under load: no call is lost, none is reported twice, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rsm.broker import AsyncClient, CallResult, Delta, Settings
from rsm.broker.protocol.codec import text
from rsm.broker.views.monitor import Monitor
from rsm.engine.fleet import Fleet
from tests.support.rsm_command import clean_env
from tests.support.sim_processes import processes_of, said, sim, state_of
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(240)

_CALLS = 200
_TOKENS = 40
_ENGINES = ("e0", "e1")


@dataclass
class Entry:
    """What a producer knows about one call, without Redis."""

    prompt: str
    chunks: list[Delta] = field(default_factory=list)
    result: CallResult | None = None


class Ledger(dict[str, Entry]):
    """All calls of a test by their ids, kept outside Redis."""

    @property
    def streaming(self) -> int:
        """The number of calls with at least one chunk."""
        return sum(bool(e.chunks) for e in self.values())

    async def follow(self, client: AsyncClient, number: int) -> None:
        """Pushes one call and records its chunks and its result."""
        call_id, entry = f"c{number}", Entry(f"prompt number {number}")
        self[call_id] = entry
        call = await client.submit(entry.prompt, id=call_id, session=f"s{number % 20}", stream=True, max_tokens=_TOKENS)
        async for delta in call.stream():
            entry.chunks.append(delta)
        entry.result = await call

    def check(self) -> None:
        """Checks that every call has its whole text, with each chunk once and in order."""
        assert len(self) == _CALLS
        for call_id, entry in self.items():
            assert entry.result is not None, call_id
            assert [p.n for p in entry.chunks] == list(range(len(entry.chunks))), call_id
            assert "".join(p.text for p in entry.chunks) == said(entry.prompt, _TOKENS) == entry.result.text
            assert [i for p in entry.chunks for i in p.token_ids] == entry.result.token_ids


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for a server, with a short path because its socket is there."""
    made = Path(f"/tmp/rsm-crash-{os.getpid()}")
    made.mkdir()
    yield made
    for path in sorted(made.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    made.rmdir()


@pytest.fixture
def fleet_settings(folder: Path) -> Settings:
    return Settings(
        redis_url=None, data_dir=folder, lease_ms=1500, heartbeat_ms=200, tick_ms=100, drain_grace_s=1, max_attempts=3
    )


@pytest.mark.parametrize("routers", [1, 2])
async def test_router_and_worker_die_under_load(fleet_settings: Settings, folder: Path, routers: int) -> None:
    fleet = Fleet(fleet_settings, routers=routers)
    ledger = Ledger()
    try:
        # 200 calls do not run at once: half of them wait when the router and the worker die.
        engines = [sim(e, step_s=0.06, max_num_seqs=48) for e in _ENGINES]
        await asyncio.to_thread(fleet.start, engines, 60)
        async with AsyncClient(settings=fleet.settings) as client:
            following = await _load_and_kill(fleet, client, ledger)
            async with asyncio.timeout(120):
                await asyncio.gather(*following)
            ledger.check()
            await _check_redis(client, Monitor(fleet.settings))
        assert len(processes_of(fleet.settings, folder)) == 1 + routers + len(_ENGINES), (
            "all processes run again, none twice"
        )
    finally:
        await asyncio.to_thread(fleet.stop)
    assert not processes_of(fleet.settings, folder)


async def _load_and_kill(fleet: Fleet, client: AsyncClient, ledger: Ledger) -> list[asyncio.Task[None]]:
    following = [asyncio.create_task(ledger.follow(client, i)) for i in range(_CALLS // 2)]
    await _until(lambda: ledger.streaming >= 20)
    router = fleet.routers[0]
    _kill(router.pid)
    following += [asyncio.create_task(ledger.follow(client, i)) for i in range(_CALLS // 2, _CALLS)]
    await _until(lambda: router.restarts == 1 and router.pid)
    await _until(lambda: ledger.streaming >= 60)
    worker = fleet.workers["e0"]
    _kill(worker.pid)
    await _until(lambda: worker.restarts == 1 and worker.pid)
    assert any(not f.done() for f in following), "the load ended too early for a proof"
    return following


async def _check_redis(client: AsyncClient, monitor: Monitor) -> None:
    """Checks that each call has one end in its log and in the inbox, that all are accounted for, and that some were
    requeued."""
    inbox: Any = await client.redis.xrange(client.keys.inbox(client._inbox))
    ends = Counter(text(fields[b"call"]) for _, fields in inbox if b"state" in fields)
    assert set(ends.values()) <= {1}, "among the entries that the client has not trimmed yet"
    for i in range(_CALLS):
        log: Any = await client.redis.xrange(client.keys.events(f"c{i}"))
        assert [b"state" in fields for _, fields in log] == [False] * (len(log) - 1) + [True]
    await _until(lambda: monitor.stats()["unaccounted"] == 0)
    stats = monitor.stats()
    assert (stats["submitted"], stats["completed"], stats["failed"], stats["pending"]) == (_CALLS, _CALLS, 0, 0)
    assert stats["requeued"] > 0
    await _until(lambda: all(state_of(monitor, e) == "READY" for e in _ENGINES))
    assert sum(e["running_tokens"] + e["queued_tokens"] for e in monitor.engines()) == 0


async def _until(condition: Any) -> None:
    await asyncio.to_thread(eventually, condition, 60)


def _kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


_OWNER = """
import sys, threading
from rsm.broker import Client, Settings
from rsm.engine.fleet import Fleet
from rsm.workers.config import EngineConfig
fleet = Fleet(Settings())
fleet.start([EngineConfig.model_validate_json(sys.argv[1])], 60)
Client(settings=fleet.settings).submit("x", id="c1", stream=True, max_tokens=5000)
print("up", flush=True)
threading.Event().wait()
"""


def test_a_fleet_does_not_outlive_its_owner(fleet_settings: Settings, folder: Path) -> None:
    """Not the router, not a worker in the middle of a call, not the server."""
    env = clean_env() | fleet_settings.environment()
    del env["RSM_REDIS_URL"]
    command = [sys.executable, "-c", _OWNER, sim().model_dump_json(exclude={"api_key"})]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        assert len(processes_of(fleet_settings, folder)) == 3, "router, worker and server"
        owner.kill()
    eventually(lambda: not processes_of(fleet_settings, folder), 60, "all of the fleet gone")
