"""Workers before remote servers: a server dies under its streams, and comes back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from broker import Client, RequestState, Settings
from broker.monitor import Monitor
from engine.fleet import Fleet
from tests.conftest import eventually
from tests.sim_http import sim_server
from tests.sim_processes import said, state_of
from workers.config import EngineConfig

pytestmark = pytest.mark.timeout(120)

_TOKENS = 300


def test_streams_go_on_elsewhere_and_the_worker_comes_back_with_its_server(settings: Settings, client: Client) -> None:
    monitor = Monitor(settings)
    fleet = Fleet(settings)
    with ExitStack() as stack:
        servers = [stack.enter_context(sim_server()) for _ in range(2)]
        engines = [
            EngineConfig(engine_id=f"e{i}", backend="openai", base_url=f"{server.url}/v1")
            for i, server in enumerate(servers)
        ]
        try:
            fleet.start(engines, 60)
            prompts = {f"c{i}": f"Tell me of {i}" for i in range(6)}
            for call_id, prompt in prompts.items():
                client.submit(prompt, id=call_id, stream=True, max_tokens=_TOKENS)
            eventually(lambda: all(int(client.redis.xlen(client.keys.events(c))) > 5 for c in prompts))
            on_victim = [c for c in prompts if client.record(c).engine == "e0"]
            assert on_victim
            servers[0].process.kill()
            for call_id, prompt in prompts.items():
                record = client.handle(call_id).wait(60)
                assert record.state is RequestState.COMPLETED, record
                assert "".join(p.text for p in client.stream(call_id)) == said(prompt, _TOKENS)
                assert (record.engine, record.attempt) == ("e1", 1 + (call_id in on_victim))
            assert state_of(monitor, "e0") != "READY"
            stack.enter_context(sim_server(port=servers[0].port))
            eventually(lambda: state_of(monitor, "e0") == "READY", 30, "e0 READY again")
        finally:
            fleet.stop()
