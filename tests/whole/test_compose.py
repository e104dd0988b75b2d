"""docker-compose.yml: its settings, and its commands as processes on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from rsm.broker import Settings
from rsm.broker.connection.embedded import find_server
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import OUTAGES
from rsm.cli import app
from tests.deploy.dockerfile import stages
from tests.support.paths import ROOT
from tests.support.rsm_command import clean_env
from tests.support.sim_processes import processes_of
from tests.support.waiting import eventually

_FILE = ROOT / "docker-compose.yml"
_BIN = Path(sys.executable).parent
_URL = "redis://redis:6379/0"
# In the order of depends_on; stopped in reverse order.
_STARTED = ("redis", "router", "worker-cpu", "node")

Service = dict[str, Any]


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    found: dict[str, Service] = yaml.safe_load(_FILE.read_text())["services"]
    return found


# -- its settings


def test_redis_is_durable_and_never_evicts(services: dict[str, Service]) -> None:
    command = services["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert services["redis"]["volumes"] == ["redis-data:/data"], "the data outlives the container"
    assert all(port.startswith("127.0.0.1:") for port in services["redis"]["ports"])


def test_every_service_is_checked_waits_for_redis_and_restarts(services: dict[str, Service]) -> None:
    assert set(services) == {*_STARTED, "worker-gpu"}
    for name, service in services.items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["restart"] == "unless-stopped", name
        if name != "redis":
            assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}, name
            assert service["environment"]["RSM_REDIS_URL"] == _URL
            assert float(service["stop_grace_period"].removesuffix("s")) > Settings().drain_grace_s


def test_profiles(services: dict[str, Service]) -> None:
    profiles = {name: service["profiles"] for name, service in services.items() if "profiles" in service}
    assert profiles == {"worker-gpu": ["gpu"], "worker-cpu": ["cpu"]}
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_our_services_run_as_the_image_s_user_on_a_read_only_root(services: dict[str, Service]) -> None:
    image = stages(ROOT / "deploy" / "Dockerfile")[-1]
    for name, service in services.items():
        if name != "redis":
            assert [service["user"]] == image.said("USER"), name
            assert service["read_only"], name
            assert service["tmpfs"] == ["/tmp"], name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
    (mounted,) = services["worker-gpu"]["volumes"]
    assert mounted == f"models:{image.environment({})['XDG_CACHE_HOME']}", (
        "otherwise each start downloads the model again"
    )


def test_one_version_everywhere(services: dict[str, Service]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    tags = {service["image"].rpartition(":")[2] for name, service in services.items() if name != "redis"}
    assert tags == {version}


@pytest.mark.parametrize("part", ["command", "healthcheck"])
def test_command_lines_are_valid(services: dict[str, Service], part: str) -> None:
    """The CLI parses them without running them, including that of the GPU worker."""
    lines = [s["command"] if part == "command" else s["healthcheck"]["test"][1:] for s in services.values()]
    ours = [line for line in lines if line[0] == "rsm"]
    assert len(ours) >= 3
    for line in ours:
        parse(line[1:])


def test_the_worker_on_a_gpu_and_its_check_name_one_engine(services: dict[str, Service]) -> None:
    gpu = services["worker-gpu"]
    params = parse(gpu["command"][1:])
    assert (params["backend"], params["engine_id"], params["gpu"]) == ("vllm", "gpu0", 0)
    assert parse(gpu["healthcheck"]["test"][2:])["ready"] == params["engine_id"]


def parse(words: list[str]) -> dict[str, Any]:
    """The parameters that the CLI parses from a command line."""
    group: Any = typer.main.get_command(app)
    name, command, rest = group.resolve_command(group.make_context("rsm", [*words], resilient_parsing=True), [*words])
    assert command is not None, words
    params: dict[str, Any] = command.make_context(name, rest).params
    return params


# -- the same commands on this machine


class Deployment:
    """The services of the file as local processes, with a server on a unix socket."""

    def __init__(self, services: dict[str, Service], folder: Path) -> None:
        self._services = services
        self.folder = folder
        self.url = f"unix://{folder}/s"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def settings(self) -> Settings:
        return Settings(namespace="rsm").with_redis(self.url)

    def start(self, name: str) -> None:
        service = self._services[name]
        command = self.local(service["command"])
        if name == "redis":
            command += ["--port", "0", "--unixsocket", f"{self.folder}/s", "--dir", str(self.folder)]
        with (self.folder / f"{name}.log").open("wb") as output:
            process = subprocess.Popen(command, env=self.env(name), stdout=output, stderr=output, cwd=self.folder)
        self.processes[name] = process

    def healthy(self, name: str) -> bool:
        """Whether the service's own health check succeeds."""
        check = self.local(self._services[name]["healthcheck"]["test"][1:])
        if name == "redis":
            check[1:1] = ["-s", f"{self.folder}/s"]
        return subprocess.run(check, env=self.env(name), capture_output=True, timeout=60, check=False).returncode == 0

    def env(self, name: str) -> dict[str, str]:
        given = {k: v.replace(_URL, self.url) for k, v in self._services[name].get("environment", {}).items()}
        return clean_env() | given

    def local(self, words: list[str]) -> list[str]:
        """A container's command as a command for this machine."""
        program = find_server() if words[0] == "redis-server" else words[0]
        installed = _BIN / words[0]
        return [str(installed) if installed.exists() else program, *[w.replace(_URL, self.url) for w in words[1:]]]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def stop(self) -> dict[str, int]:
        """Stops all services like `docker compose down`: SIGTERM in reverse order; returns the exit statuses."""
        for process in reversed(self.processes.values()):
            process.terminate()
            process.wait(60)
        return {name: process.returncode for name, process in self.processes.items()}


@pytest.fixture
def deployment(services: dict[str, Service]) -> Iterator[Deployment]:
    folder = Path(f"/tmp/rsm-compose-{os.getpid()}")  # short, because a socket's path has at most 107 bytes
    folder.mkdir()
    made = Deployment(services, folder)
    yield made
    for process in made.processes.values():
        process.kill()
        process.wait()
    shutil.rmtree(folder)


def test_the_deployment_runs_a_call_pushed_by_a_bare_xadd(deployment: Deployment) -> None:
    deployment.start("redis")
    server: Any = connect(deployment.settings)
    eventually(lambda: answers(server), what="redis")
    for name in _STARTED[1:]:
        deployment.start(name)
    entry = {"id": "c1", "session": "s1", "json": '{"prompt":"Explain quantum computing","max_tokens":8}'}
    server.xadd("{rsm}:calls", entry)
    eventually(lambda: server.hget("{rsm}:call:c1", "state") == b"COMPLETED", 30)
    assert server.hget("{rsm}:call:c1", "engine") == b"cpu0"
    assert server.config_get("appendonly") == {"appendonly": "yes"}

    for name in _STARTED:
        if name != "redis" or shutil.which("redis-cli"):
            eventually(lambda name=name: deployment.healthy(name), 30, f"{name} healthy")  # type: ignore[misc]
    server.close()
    worker = deployment.processes["worker-cpu"]
    worker.terminate()
    worker.wait(60)
    assert not deployment.healthy("worker-cpu")
    assert deployment.stop() == dict.fromkeys(deployment.processes, 0)
    assert not processes_of(deployment.settings, deployment.folder)


def answers(server: Any) -> bool:
    try:
        return bool(server.ping())
    except OUTAGES:
        return False
