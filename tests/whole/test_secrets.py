"""Prompts, outputs and passwords appear in no log, repr, view, command line or key except the call's own."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from pydantic import SecretStr, ValidationError

from rsm.broker import CallFailed, Client, Settings
from rsm.broker.client.request import build
from rsm.broker.connection.factory import connect
from rsm.broker.protocol import codec
from rsm.broker.protocol.events import read_event
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.models import CallRecord, RequestState
from rsm.broker.protocol.transitions import Claimed, Event, Fence, Finish, RawCall, Release, Transitions
from rsm.broker.views.dead_letters import DeadLetter, DeadLetters
from rsm.broker.views.monitor import Monitor
from rsm.cli.checks import examine
from rsm.engine.process import LLMRequest
from rsm.router.intake import read_entry
from rsm.workers.backends.base import Backend, Chunk, EngineFacts, EngineLoad, Job, Outcome, Resumed
from rsm.workers.config import EngineConfig
from rsm.workers.environment import API_KEY_VARIABLE, CONFIG_VARIABLE
from rsm.workers.runtime.calls import Calls
from rsm.workers.supervision.node import NodeClient
from tests.support.fake_openai import Server
from tests.support.nodes.process import await_listening
from tests.support.roles import Roles, secret
from tests.support.rsm_command import RSM, clean_env
from tests.support.sim_processes import sim, state_of
from tests.support.waiting import eventually

PROMPT, OUTPUT, KEY = "marked-prompt-7f3a", "marked-output-7f3a", "marked-key-7f3a"
MARKERS = (PROMPT, OUTPUT, KEY, *(secret(role) for role in ("router", "worker", "producer", "node", "operator")))


def found_in(text: str) -> list[str]:
    return [marker for marker in MARKERS if marker in text]


# -- reprs


def _objects() -> Iterator[object]:
    url = f"redis://user:{KEY}@host:1/0"
    settings = Settings(redis_url=SecretStr(url))
    fence = Fence("c1", "1-1", 1)
    body = {"prompt": PROMPT}
    call = build(PROMPT, max_body_bytes=4096, id="c1")
    record = CallRecord.from_hash(
        "c1",
        {b"state": b"COMPLETED", b"session": b"s", b"result": codec.encode({"text": OUTPUT, "token_ids": [1]}, "json")},
    )
    transitions = Transitions(Keys(), settings)
    yield from (settings, call, record, record.result, call.request)
    yield EngineConfig(engine_id="e", backend="openai", base_url="http://h", api_key=SecretStr(KEY))
    done = Finish(fence, RequestState.COMPLETED, "", "", OUTPUT.encode(), 0, 0, 0, 0)
    yield from (transitions.submit([call]), transitions.finish("e", [done]), done)
    yield Finish(fence, RequestState.FAILED, "engine_error", PROMPT, OUTPUT.encode(), 0, 0, 0, 0)
    yield from (Event(fence, 0, OUTPUT, [1], OUTPUT, OUTPUT), Release(fence, "error", "engine_error", PROMPT))
    yield from (Job("c/1", "c", "s", "generate", body), Chunk(OUTPUT, [1], OUTPUT))
    yield Outcome("stop", OUTPUT, response={"x": OUTPUT})
    yield Resumed(OUTPUT, [1], [OUTPUT], 1)
    for field in (b"text", b"chunk"):
        yield read_event("c1", {b"n": b"0", field: OUTPUT.encode()}, "1-1")
    arrival = read_entry("1-1", {b"json": b'{"prompt":"%s"}' % PROMPT.encode()}, 4096)
    assert isinstance(getattr(arrival, "raw", None), RawCall)
    yield arrival
    yield read_entry("1-1", {b"json": b'{"prompt":"%s"' % PROMPT.encode()}, 4096)
    yield DeadLetter("1-1", "c1", "engine_error", "", "s", "generate", "", 3, 0, 9, "body", PROMPT.encode())
    yield LLMRequest("c1", "s", PROMPT, {"stop": PROMPT})
    yield connect(settings)
    yield CallFailed(dataclasses.replace(record, state=RequestState.FAILED, error="The engine failed."))


@pytest.mark.parametrize("thing", list(_objects()), ids=lambda thing: type(thing).__name__)
def test_no_repr_shows_a_prompt_an_output_or_a_password(thing: object) -> None:
    assert found_in(f"{thing!r} {thing!s}") == []


def test_errors_of_configuration_quote_no_value() -> None:
    for make in (
        lambda: EngineConfig.model_validate({"engine_id": "e", "nonsense": KEY}),
        lambda: Settings.model_validate({"redis_url": ["x", KEY]}),
    ):
        with pytest.raises(ValidationError) as refused:
            make()
        assert found_in(str(refused.value)) == []


# -- an exception that quotes the prompt


class _Blurts(Backend):
    """An engine whose errors quote the body."""

    async def start(self) -> EngineFacts:
        return EngineFacts("m", 1)

    async def run(self, job: Job, emit: Any) -> Outcome:
        raise KeyError(str(job.body))

    def abort(self, key: str) -> None: ...

    def load(self) -> EngineLoad:
        return EngineLoad()

    async def died(self) -> str:
        await asyncio.Event().wait()
        return ""

    async def stop(self, grace_s: float) -> None: ...


async def test_an_error_that_quotes_the_prompt_is_not_shown(
    settings: Settings, db: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    put: list[Any] = []
    calls = Calls(_Blurts(), db, Keys(settings.namespace), put.append, lambda: None, lambda _: None)
    body = codec.encode({"prompt": PROMPT})
    claimed = Claimed(Fence("c", "1-1", 1), "s", "generate", False, "", 0, 0, 0, "", 1, "body", body)
    calls.start([claimed])
    await calls.settle(10)
    assert put[0].error == "The engine failed: KeyError."
    assert "in run" in caplog.text, "the log has the place of the error"
    assert found_in(caplog.text) == []


# -- the main job, at DEBUG


@pytest.mark.timeout(400)  # nine processes, one after the other, on a machine with other work
async def test_the_main_job_at_debug_level_shows_no_secret(
    roles: Roles, settings: Settings, db: redis.Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    remote = Server()
    await remote.open()
    shown = await asyncio.to_thread(_main_job, roles, settings, db, tmp_path, remote)
    await remote.close()
    for name, text in {**shown, "this process": caplog.text}.items():
        assert found_in(text) == [], name
    assert all(shown.values()), "each source has output"


def _main_job(roles: Roles, settings: Settings, db: Any, folder: Path, remote: Server) -> dict[str, str]:
    """All output of a deployment, by source."""
    debug = {"RSM_LOG_LEVEL": "DEBUG"}
    logs = {name: folder / f"{name}.log" for name in ("router", "sim", "openai", "node")}
    python = sys.executable
    openai = EngineConfig(engine_id="o1", backend="openai", base_url=remote.url, served_model_name="remote")
    commands = {
        "router": ([python, "-P", "-m", "rsm.router"], "router", {}),
        "sim": (
            [python, "-P", "-m", "rsm.workers", "--supervised"],
            "worker",
            {CONFIG_VARIABLE: sim("s1").model_dump_json()},
        ),
        "openai": (
            [python, "-P", "-m", "rsm.workers"],
            "worker",
            {CONFIG_VARIABLE: openai.model_dump_json(exclude={"api_key"}), API_KEY_VARIABLE: KEY},
        ),
        "node": ([RSM, "node", "--name", "host"], "node", {}),
    }
    processes = []
    for name, (command, role, more) in commands.items():
        env = clean_env() | roles.settings(role).environment() | debug | more
        with logs[name].open("ab") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        shown = _use(roles, settings, db, remote)
        shown["processes"] = " ".join(" ".join(p.cmdline()) for p in _ours(processes))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)
    return shown | {name: log.read_text() for name, log in logs.items()}


def _ours(processes: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    found = [psutil.Process(p.pid) for p in processes]
    return [*found, *(child for p in found for child in p.children(recursive=True))]


def _use(roles: Roles, settings: Settings, db: Any, remote: Server) -> dict[str, str]:
    shown = {}
    monitor = Monitor(roles.settings("observer"))
    eventually(lambda: {state_of(monitor, e) for e in ("s1", "o1")} == {"READY"}, 40)
    with Client(settings=roles.settings("producer")) as client:
        good = [
            client.submit(f"{PROMPT} {m}", model=m, stream=True, max_tokens=3, session="s")
            for m in ("sim-8b", "remote")
        ]
        for call in good:
            assert [d.text for d in call.stream()]
            call.result(20)
        remote.fail = (400, f"no: {PROMPT}".encode())
        failed = client.submit(PROMPT, id="failed", model="remote", max_tokens=3).wait(20)
        assert failed.state is RequestState.FAILED
        client.submit(PROMPT, id="bad", temperature=-5, model="sim-8b").wait(20)
        endless = client.submit(PROMPT, id="endless", model="sim-8b", max_tokens=100_000)
        eventually(lambda: monitor.running_calls())
        views = [
            monitor.stats(),
            monitor.engines(),
            monitor.sessions(),
            monitor.active_calls(),
            monitor.running_calls(),
        ]
        endless.cancel()
    db.xadd(Keys(settings.namespace).calls, {"id": "x", "kind": "nonsense", "json": f'{{"prompt":"{PROMPT}"}}'})
    eventually(lambda: monitor.backlog() == 0)
    await_listening(roles.settings("operator"), "host")
    NodeClient("host", roles.settings("operator")).start_engine(sim("n1"), 40)
    NodeClient("host", roles.settings("operator")).stop_engine("n1")
    views += [DeadLetters(monitor.settings).ls(), examine(roles.settings("operator"))]
    shown["views"] = repr(views)
    shown["commands"] = "".join(_rsm(roles.settings("operator"), *words) for words in _COMMANDS)
    shown["keys"] = _other_keys(db, settings)
    return shown


_COMMANDS = [[name] for name in ("ps", "engines", "sessions", "stats", "doctor")]
_COMMANDS += [["dead", "ls"], ["engines", "--json"], ["call", "bad"]]


def _rsm(settings: Settings, *words: str) -> str:
    env = clean_env() | settings.environment() | {"RSM_LOG_LEVEL": "DEBUG"}
    done = subprocess.run([RSM, *words], env=env, capture_output=True, text=True, timeout=40, check=False)
    return done.stdout + done.stderr


def _other_keys(db: Any, settings: Settings) -> str:
    """The content of all keys except records, logs, inboxes and dead letters, which keep bodies for a replay."""
    prefix = Keys(settings.namespace).prefix.encode()
    read = {b"hash": db.hgetall, b"set": db.smembers, b"stream": db.xrange, b"string": db.get}
    shown = []
    for key in db.scan_iter(count=1000):
        if key.startswith((prefix + b"call:", prefix + b"inbox:", prefix + b"dead")):
            continue
        if key.startswith((prefix, b"rq:")):
            kind = db.type(key)
            many = {b"zset": db.zrange, b"list": db.lrange}
            shown.append(f"{key!r}: {read[kind](key) if kind in read else many[kind](key, 0, -1)!r}")
    return "\n".join(shown)
