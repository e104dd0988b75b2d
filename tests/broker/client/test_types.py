"""The public API as type checkers see it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

SNIPPET = """
import asyncio
from rsm import AsyncClient, AsyncShardedClient, CallFailed, Client, EngineConfig, MultiEngineManager, Settings
from rsm import ShardedClient
from rsm.frontend import SessionManager


def sync(client: Client, sharded: ShardedClient, error: CallFailed) -> None:
    reveal_type(client.submit("x", max_tokens=3))  # CallHandle
    reveal_type(client.submit("x").result())  # CallResult
    reveal_type(next(client.stream("c1")))  # Delta
    reveal_type(sharded.submit("x", session="s"))  # CallHandle
    reveal_type(sharded.record("c1").session_id)  # str
    reveal_type(error.record)  # CallRecord


async def asynchronous(client: AsyncClient, sharded: AsyncShardedClient, manager: MultiEngineManager) -> None:
    call = await client.submit("x", timeout=3.5)
    reveal_type(call)  # AsyncCall
    reveal_type(await call)  # CallResult
    reveal_type(await client.handle("c1"))  # AsyncCall
    reveal_type(await sharded.submit("x"))  # AsyncCall
    future = await manager.submit_request("s1", "x", sampling_params={"max_tokens": 3})
    reveal_type(await future)  # CallResult
    reveal_type(future.request_id)  # str
    reveal_type(await asyncio.wait_for(future, 3))  # CallResult
    async for delta in manager.stream_request("s1", "x"):
        reveal_type(delta)  # Delta
    with SessionManager() as session:
        reveal_type(session)  # str


reveal_type(EngineConfig(engine_id="e1").max_num_seqs)  # int
reveal_type(Settings(lease_ms=2000).namespace)  # str
"""
EXPECTED = [line.rpartition("# ")[2] for line in SNIPPET.splitlines() if "reveal_type" in line]


def test_mypy_reveals_what_users_expect(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "snippet.py"]
    env = os.environ | {"MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    revealed = re.findall(r'note: Revealed type is "([\w.]+)"', done.stdout)
    assert [name.rpartition(".")[2] for name in revealed] == EXPECTED, done.stdout + done.stderr
    assert "error" not in done.stdout
