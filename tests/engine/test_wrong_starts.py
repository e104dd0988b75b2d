"""Starts that can never work: each ends at the first try, and its error says what is wrong and what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rsm.broker import BrokerUnavailable, EngineFailed, EvictingRedis, InvalidRequest, RsmError, Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.views.monitor import Monitor
from rsm.engine import EngineConfig, MultiEngineManager
from rsm.workers.backends.base import EngineMisconfigured
from rsm.workers.backends.vllm.start import args
from tests.support.rsm_command import RSM, clean_env
from tests.support.sim_processes import WorkerProcess, processes_of, sim
from tests.support.waiting import eventually

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")


class OtherServer(BaseHTTPRequestHandler):
    """Serves one model, if the key is right."""

    def do_GET(self) -> None:
        right = self.headers.get("Authorization") == "Bearer right"
        self.send_response(200 if right else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "its-model"}]}).encode() if right else b"{}")

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@pytest.fixture
def remote() -> Iterator[str]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), OtherServer)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()


@dataclass
class Wrong:
    """A wrong configuration and its error. The value URL is replaced by the other server's."""

    match: str
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    raises: type[Exception] = EngineFailed


REMOTE = {"backend": "openai", "base_url": "URL"}
WRONG = {
    "a folder that is not there": Wrong(
        "There is no model at /models/none: give an existing folder", {"backend": "vllm", "model": "/models/none"}
    ),
    "an argument that the modelled engine does not have": Wrong(
        "engine_args of e do not fit backend sim: .*no_such", {"backend": "sim", "engine_args": {"no_such": 1}}
    ),
    "a service unit that does not exist": Wrong(
        "There is no service unit 'joules'", {"backend": "sim"}, {"service_unit": "joules"}
    ),
    "a policy that does not exist": Wrong(
        "There is no routing policy 'fastest'.*autellix", {"backend": "sim"}, {"policy": "fastest"}, InvalidRequest
    ),
    "a key that the server refuses": Wrong(
        "refuses the API key; set RSM_OPENAI_API_KEY", REMOTE, {"openai_api_key": "wrong"}
    ),
    "a model that the server does not serve": Wrong(
        "serves no model other, but its-model. Set model to one",
        REMOTE | {"model": "other"},
        {"openai_api_key": "right"},
    ),
    "an invalid URL": Wrong("base_url must be a URL", {"backend": "openai", "base_url": "nonsense"}),
}
WRONG_VLLM = {
    "an argument that vLLM does not have": Wrong(
        "has no argument max_model_length. Did you mean max_model_len", {"engine_args": {"max_model_length": 9}}
    ),
    "a value that vLLM does not accept": Wrong("vLLM does not accept its arguments: .*dtype", {"dtype": "float3"}),
    "more tokens than the model has": Wrong("vLLM could not start: .*max_model_len", {"max_model_len": 10_000_000}),
    "a folder without a model": Wrong("vLLM could not start: .*", {"model": "FOLDER"}),
}


def begin(settings: Settings, wrong: Wrong, **replacements: str) -> str:
    """Starts a fleet that cannot start; returns the error message."""
    config = {name: replacements.get(str(value), value) for name, value in wrong.config.items()}
    manager = MultiEngineManager(
        [EngineConfig(engine_id="e", **config)], settings=Settings(**dict(settings) | wrong.settings), start_timeout=90
    )
    with pytest.raises(wrong.raises, match=wrong.match) as caught:
        manager.start()
    assert not processes_of(settings), "nothing is left running"
    message = str(caught.value)
    assert "log says why" not in message
    return message


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_start(settings: Settings, remote: str, name: str) -> None:
    wrong = WRONG[name]
    message = begin(settings, wrong, URL=remote)
    if wrong.raises is EngineFailed:
        assert "tried" not in message, "only one try"
        engine = Monitor(settings).engine("e")
        assert engine["state"] == "STOPPED"
        assert engine["error"] in message, "the engine's record has the cause"


@needs_vllm
@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", WRONG_VLLM)
def test_a_wrong_start_of_vllm(settings: Settings, tmp_path: Path, name: str) -> None:
    message = begin(settings, WRONG_VLLM[name], FOLDER=str(tmp_path))
    assert "tried" not in message
    assert Monitor(settings).engine("e")["error"] in message


@needs_vllm
@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(300)
def test_the_cause_in_another_process_is_found(settings: Settings) -> None:
    """vLLM's engine fails in a process of its own; here its exception only says that the cause is above."""
    too_small = {"kv_cache_memory_bytes": 1 << 16}
    config = EngineConfig(engine_id="e", max_model_len=8192, engine_args=too_small)
    with WorkerProcessFor(config, settings) as worker:
        eventually(lambda: worker.process.poll() is not None, 120, "it gives up")
        error = Monitor(settings).engine("e")["error"]
    assert error.startswith("vLLM could not start: ValueError: "), error
    assert "cache" in error
    assert "see root cause above" not in error.lower()


class WorkerProcessFor:
    """A context with a worker of any configuration."""

    def __init__(self, config: EngineConfig, settings: Settings) -> None:
        env = clean_env() | settings.environment() | {"RSM_ENGINE": config.as_json()}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rsm.workers"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> WorkerProcessFor:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_vllm_is_not_installed(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'vllm'\", name='vllm')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "rsm.workers"]
    env = clean_env() | settings.environment() | {"RSM_ENGINE": '{"engine_id":"e"}', "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78, done.stderr
    assert "Traceback" not in done.stderr
    error = Monitor(settings).engine("e")["error"]
    assert error == "vLLM is not installed: pip install 'rsm-engine[vllm]', or choose --backend sim or openai."


@pytest.mark.parametrize(
    ("gpu", "count", "match"), [(3, 1, "needs GPU 3, .* 1 here"), (0, 2, "GPUs 0 to 1"), (1, 1, "GPU 1")]
)
def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch, gpu: int, count: int, match: str) -> None:
    """No GPU is needed: the list of visible ones is faked."""
    monkeypatch.setattr(args, "visible_gpus", lambda: ("7",))
    assert args._devices(0, 1) == "7"
    with pytest.raises(EngineMisconfigured, match=match):
        args._devices(gpu, count)


def test_an_engine_id_in_use(settings: Settings, tmp_path: Path) -> None:
    """Another fleet's engine with the same id does not count as this fleet's."""
    other = WorkerProcess(sim("e0", model="another-model"), settings, tmp_path / "other.log")
    try:
        monitor = Monitor(settings)
        eventually(lambda: _state(monitor) == "READY", what=other.log())
        began = time.monotonic()
        with pytest.raises(
            EngineFailed, match=rf"Engine id e0 is in use .*pid {other.pid} on .*choose another engine_id"
        ):
            MultiEngineManager([sim("e0")], settings=settings, start_timeout=90).start()
        assert time.monotonic() - began < 60, "long before its time is up"
        assert (monitor.engine("e0")["state"], monitor.engine("e0")["model"]) == ("READY", "another-model")
        late = MultiEngineManager([sim("e1")], settings=settings, start_timeout=90)
        late.start()
        try:
            with pytest.raises(EngineFailed, match="Engine id e0 is in use"):
                late.add_engine(sim("e0"))
        finally:
            late.stop()
    finally:
        other.kill()


def _state(monitor: Monitor) -> str:
    try:
        return str(monitor.engine("e0")["state"])
    except RsmError:
        return ""


def test_a_start_waits_for_a_server_that_is_not_running_yet(settings: Settings) -> None:
    """That is not a configuration error, because the server may start. After the timeout the error has the cause."""
    config = EngineConfig(
        engine_id="e", backend="openai", base_url="http://127.0.0.1:1/v1", engine_args={"connect_s": 0.1}
    )
    with pytest.raises(EngineFailed, match=r"\(tried \d times\): No OpenAI-compatible server answers at 127.0.0.1:1 "):
        MultiEngineManager([config], settings=settings, start_timeout=90).start()


def test_no_redis(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match=r"none\.sock did not answer for 5 s"):
        MultiEngineManager([sim("e")], redis_url=f"unix://{tmp_path}/none.sock", start_timeout=60).start()


def test_a_redis_that_evicts(fragile: EmbeddedRedis, change_policy: Callable[[str], None]) -> None:
    change_policy("allkeys-lru")
    with pytest.raises(EvictingRedis, match="noeviction"):
        MultiEngineManager([sim("e")], redis_url=fragile.url, start_timeout=60).start()


@pytest.fixture
def change_policy(fragile: EmbeddedRedis) -> Callable[[str], None]:
    import redis

    def change(policy: str) -> None:
        with redis.Redis(unix_socket_path=str(fragile.socket)) as server:
            server.config_set("maxmemory-policy", policy)

    return change


def test_doctor_and_engines_show_the_cause(settings: Settings) -> None:
    begin(settings, WRONG["an argument that the modelled engine does not have"])
    env = clean_env() | settings.environment()
    shown = subprocess.run([RSM, "doctor"], env=env, capture_output=True, text=True, timeout=60, check=False).stdout
    assert "no_such" in " ".join(shown.split())
    listed = subprocess.run([RSM, "engines", "--json"], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "no_such" in json.loads(listed.stdout)[0]["error"]


def test_up_exits_with_the_cause(settings: Settings) -> None:
    command = [RSM, "up", "--backend", "sim", "--engine-arg", "no_such=1"]
    env = clean_env() | settings.environment()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1
    assert "Engine e0 did not start: engine_args of e0 do not fit backend sim" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
