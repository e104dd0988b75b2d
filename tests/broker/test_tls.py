"""Every process over TLS, with certificates on both sides. A wrong CA, a wrong name and no certificate are rejected."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsm.broker import AsyncClient, BrokerUnavailable, Client, Settings
from rsm.broker.connection.dedicated import DedicatedConnection
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect
from rsm.broker.views.monitor import Monitor
from rsm.cli.checks import examine
from rsm.workers.supervision.node import NodeClient
from tests.support.nodes.process import await_listening
from tests.support.rsm_command import RSM, clean_env
from tests.support.sim_processes import WorkerProcess, processes_of, sim, state_of
from tests.support.tls import Certificates, TlsFront
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def front(server: EmbeddedRedis, certificates: Certificates) -> Iterator[TlsFront]:
    with TlsFront(server.socket, certificates) as made:
        yield made


def over_tls(
    settings: Settings, front: TlsFront, made: Certificates, *, ca: str = "ca.pem", host: str = "localhost"
) -> Settings:
    login = f"ssl_certfile={made.path('client.pem')}&ssl_keyfile={made.path('client.key')}"
    return settings.with_redis(f"rediss://{host}:{front.port}/0?ssl_ca_certs={made.path(ca)}&{login}")


async def test_every_part_works_over_tls(
    settings: Settings, front: TlsFront, certificates: Certificates, tmp_path: Path
) -> None:
    secure = over_tls(settings, front, certificates)
    env = clean_env() | secure.environment()
    with (tmp_path / "log").open("ab") as log:
        router = subprocess.Popen([sys.executable, "-P", "-m", "rsm.router"], env=env, stdout=log, stderr=log)
        node = subprocess.Popen([RSM, "node", "--name", "host"], env=env, stdout=log, stderr=log)
    worker = WorkerProcess(sim(), secure, tmp_path / "worker")
    try:
        eventually(lambda: state_of(Monitor(secure), "e1") == "READY")
        with Client(settings=secure) as client:  # over a DedicatedConnection, a pool and a thread's own connection
            call = client.submit("hi", stream=True, max_tokens=3)
            assert [d.text for d in call.stream()]
            assert call.result(20).completion_tokens == 3
        async with AsyncClient(settings=secure) as other:
            call2 = await other.submit("hi", stream=True, max_tokens=3)
            assert [d.text async for d in call2.stream()]
        assert [c for c in examine(secure) if c.status == "problem"] == []
        await_listening(secure, "host")
        assert NodeClient("host", secure).start_engine(sim("e2"), 40)["state"] == "READY"
        NodeClient("host", secure).stop_engine("e2")
    finally:
        for process in (router, node):
            process.terminate()
        worker.kill()
        for process in (router, node):
            process.wait(20)
        for left in processes_of(secure):
            left.kill()


@pytest.mark.parametrize(("ca", "host"), [("other.pem", "localhost"), ("ca.pem", "127.0.0.1")])
async def test_a_server_that_cannot_prove_its_name_is_refused(
    settings: Settings, front: TlsFront, certificates: Certificates, ca: str, host: str
) -> None:
    wrong = over_tls(settings, front, certificates, ca=ca, host=host)
    with connect(wrong) as plain, pytest.raises(Exception, match="certificate verify failed"):
        plain.ping()
    line = DedicatedConnection(wrong)
    with pytest.raises(Exception, match="certificate verify failed"):
        line.execute_command("PING")
    line.close()
    with Client(settings=wrong, redis_timeout=0.2) as client, pytest.raises(BrokerUnavailable):
        client.submit("hi")
    async with AsyncClient(settings=wrong, redis_timeout=0.2) as other:
        with pytest.raises(BrokerUnavailable):
            await other.submit("hi")


def test_a_client_without_a_certificate_is_refused(
    settings: Settings, front: TlsFront, certificates: Certificates
) -> None:
    bare = settings.with_redis(f"rediss://localhost:{front.port}/0?ssl_ca_certs={certificates.ca}")
    with Client(settings=bare, redis_timeout=0.2) as client, pytest.raises(BrokerUnavailable):
        client.submit("hi")
