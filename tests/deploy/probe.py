"""A user's project: uses an installed rsm-engine with all extras but vLLM. Imports no other code of this repository.

Runs as a script, with the Python of any environment and in any folder. Prints one line, or fails with a traceback.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import rsm
from rsm.broker import AsyncClient, Client, Settings
from rsm.engine import EngineConfig, MultiEngineManager
from rsm.frontend import GlobalProcessTable, SessionManager

RSM = str(Path(sys.executable).with_name("rsm"))
TIMEOUT_S = 60.0
_TOKENS = 4


def main() -> None:
    settings = Settings(redis_url=None, lease_ms=1500, heartbeat_ms=200, tick_ms=100)
    engines = [EngineConfig(engine_id=f"e{i}", model="m", backend="sim") for i in range(2)]
    manager = MultiEngineManager(engines, settings=settings, start_timeout=TIMEOUT_S)
    manager.start()
    try:
        asyncio.run(calls_of_a_manager(manager))
        calls_of_clients(manager.settings)
        commands(manager.settings.environment())
        engine_on_a_node(manager)
        engine_behind_http(manager)
    finally:
        manager.stop()
    command("simulate", "--seconds", "60", "--rate", "0.5")
    print("everything works, from", Path(rsm.__file__).parent)


async def calls_of_a_manager(manager: MultiEngineManager) -> None:
    sampling = {"max_tokens": _TOKENS}
    result = await asyncio.wait_for(await manager.submit_request("s", "hi", sampling_params=sampling), TIMEOUT_S)
    deltas = [delta.text async for delta in manager.stream_request("s", "hi", sampling_params=sampling)]
    assert "".join(deltas) == result.text != ""
    async with AsyncClient(settings=manager.settings) as client:
        call = await client.submit("hi", max_tokens=_TOKENS)
        assert (await call.result()).text == result.text


def calls_of_clients(settings: Settings) -> None:
    with Client(settings=settings) as client, SessionManager(GlobalProcessTable(settings)) as session:
        assert client.submit("hi", session=session, max_tokens=_TOKENS).result(TIMEOUT_S).text
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": _TOKENS}
        assert client.submit(chat, kind="chat.completions").result(TIMEOUT_S).response


def commands(env: Mapping[str, str]) -> None:
    assert "usage" in command("--help").lower()
    assert command("--version").startswith("rsm-engine ")
    assert len(command("submit", "hi", "--max-tokens", str(_TOKENS), env=env).split()) == _TOKENS
    for words in (("engines",), ("engines", "--json"), ("ps",), ("sessions",), ("stats",)):
        assert command(*words, env=env)


def engine_on_a_node(manager: MultiEngineManager) -> None:
    with running("node", "--name", "probe", env=manager.settings.environment()):
        await_node(manager.settings)
        manager.add_engine(EngineConfig(engine_id="n0", model="on-a-node", backend="sim"), node="probe")
        assert_served(manager.settings, "on-a-node")
        manager.remove_engine("n0")


def await_node(settings: Settings) -> None:
    from rsm.workers.supervision.node import listening

    until = time.monotonic() + TIMEOUT_S
    while "probe" not in listening(settings):
        assert time.monotonic() < until, "the node does not listen"
        time.sleep(0.1)


def engine_behind_http(manager: MultiEngineManager) -> None:
    with running("sim-server", "--port", "0", "--model", "remote") as server:
        assert server.stdout is not None
        url = next(word for word in server.stdout.readline().split() if word.startswith("http://"))
        manager.add_engine(EngineConfig(engine_id="o0", model="remote", backend="openai", base_url=url))
        assert_served(manager.settings, "remote")
        manager.remove_engine("o0")


def assert_served(settings: Settings, model: str) -> None:
    with Client(settings=settings) as client:
        assert client.submit("hi", model=model, max_tokens=_TOKENS).result(TIMEOUT_S).text


def command(*words: str, env: Mapping[str, str] | None = None) -> str:
    """Runs an `rsm` command. Returns its output."""
    done = subprocess.run(
        [RSM, *words],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    sys.stderr.write(done.stderr)
    assert done.returncode == 0, f"{words} ended with {done.returncode}: {done.stderr.strip().rpartition(chr(10))[2]}"
    return done.stdout


@contextmanager
def running(*words: str, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Runs an `rsm` process until the block is left. Then it must end in order."""
    with subprocess.Popen(
        [RSM, *words], env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            assert process.wait(TIMEOUT_S) == 0, words


if __name__ == "__main__":
    main()
