"""Real worker processes with modelled engines, and the expected results of undisturbed calls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from chaos import leaks
from rsm.broker import Client, RequestState, Settings
from rsm.broker.client.handles import CallHandle
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.errors import UnknownCall
from rsm.broker.views.monitor import Monitor
from rsm.workers.backends.sim.text import Prompt, answer
from rsm.workers.config import EngineConfig
from rsm.workers.environment import CONFIG_VARIABLE
from tests.support.rsm_command import clean_env

_WAIT_S = 60


def sim(engine_id: str = "e1", step_s: float = 0.01, max_num_seqs: int = 64, **engine_args: Any) -> EngineConfig:
    """An engine whose calls produce a token every `step_s` seconds; nothing else takes time."""
    times = {"step_s": step_s, "prefill_token_s": 0, "decode_seq_s": 0, "context_token_s": 0}
    return EngineConfig(engine_id=engine_id, backend="sim", max_num_seqs=max_num_seqs, engine_args=times | engine_args)


def said(prompt: str, max_tokens: int) -> str:
    """What an undisturbed engine answers."""
    return answer(Prompt.of(prompt).seed(), max_tokens).text


def assert_undisturbed(client: Client, call_id: str, prompt: str, max_tokens: int) -> None:
    """Asserts that a streamed call completed, and that its log holds each token once, no gaps, and one end."""
    record = client.record(call_id)
    assert record.state is RequestState.COMPLETED, record
    assert record.result is not None
    chunks = list(client.stream(call_id))
    assert [p.n for p in chunks] == list(range(len(chunks)))
    assert "".join(p.text for p in chunks) == said(prompt, max_tokens) == record.result.text
    assert [i for p in chunks for i in p.token_ids] == record.result.token_ids
    log: Any = client.redis.xrange(client.keys.events(call_id))
    assert [b"state" in fields for _, fields in log] == [False] * len(chunks) + [True]


class WorkerProcess:
    """One `python -m rsm.workers`, with its output in a file."""

    def __init__(self, config: EngineConfig, settings: Settings, log: Path) -> None:
        self.engine_id = config.engine_id
        self._log = log
        env = clean_env() | settings.environment() | {CONFIG_VARIABLE: config.model_dump_json(exclude={"api_key"})}
        with log.open("ab") as output:
            command = [sys.executable, "-P", "-m", "rsm.workers"]
            self._process = subprocess.Popen(command, env=env, stdout=output, stderr=output)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        return self._log.read_text()

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait(_WAIT_S)

    def kill(self) -> None:
        """kill -9, also for a process that has ended or hangs."""
        self._process.kill()
        self._process.wait()


Start = Callable[..., WorkerProcess]


def chunks(client: Client, handle: CallHandle) -> int:
    """How many events the call's log has."""
    return int(client.redis.xlen(client.keys.events(handle.id)))


def submit_streams(client: Client, count: int, max_tokens: int) -> dict[str, CallHandle]:
    """Streamed calls by their prompts."""
    prompts = [f"prompt number {i}" for i in range(count)]
    return {p: client.submit(p, stream=True, max_tokens=max_tokens) for p in prompts}


def all_speak(client: Client, handles: Sequence[CallHandle]) -> bool:
    return all(chunks(client, h) for h in handles)


def take_away(server: EmbeddedRedis, how: str) -> None:
    """Makes Redis fail. "gone": it refuses connections. "hanging": it accepts them and does not answer."""
    if how == "gone":
        server.kill()
    else:
        os.kill(server.pid or 0, signal.SIGSTOP)


def bring_back(server: EmbeddedRedis, how: str) -> None:
    if how == "gone":
        server.start()
    else:
        os.kill(server.pid or 0, signal.SIGCONT)


def state_of(monitor: Monitor, engine_id: str) -> str:
    try:
        return str(monitor.engine(engine_id)["state"])
    except UnknownCall:
        return ""


def processes_of(settings: Settings, folder: Path | None = None) -> list[psutil.Process]:
    """Routers, workers, supervisors and nodes of one namespace. With `folder`, also the server in it."""
    return leaks.processes_of(settings.namespace, folder, settings.url())
