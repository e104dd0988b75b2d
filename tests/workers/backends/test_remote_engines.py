"""Workers with remote servers: a server dies during its streams, and comes back."""

from __future__ import annotations

import json
from contextlib import ExitStack

import httpx
import pytest

from rsm.broker import Client, RequestState, Settings
from rsm.broker.views.monitor import Monitor
from rsm.engine.fleet import Fleet
from rsm.workers.config import EngineConfig
from tests.support.sim_http import sim_server
from tests.support.sim_processes import said, state_of
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(120)

_TOKENS = 300


def streamed_text(client: Client, call_id: str) -> str:
    """The text of a chat's stream."""
    documents = [json.loads(chunk) for delta in client.stream(call_id) for chunk in delta.chunks]
    return "".join(choice["delta"].get("content") or "" for doc in documents for choice in doc["choices"])


def test_streams_resume_elsewhere_and_the_worker_comes_back_with_its_server(settings: Settings, client: Client) -> None:
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
            chats = {f"k{i}": {"messages": [{"role": "user", "content": f"Tell me of {i}"}]} for i in range(6)}
            for call_id, prompt in prompts.items():
                client.submit(prompt, id=call_id, stream=True, max_tokens=_TOKENS)
            for call_id, body in chats.items():
                client.submit(body, id=call_id, kind="chat.completions", stream=True, max_tokens=_TOKENS)
            calls = [*prompts, *chats]
            eventually(lambda: all(int(client.redis.xlen(client.keys.events(c))) > 5 for c in calls))
            on_victim = [c for c in calls if client.record(c).engine_id == "e0"]
            assert {c[0] for c in on_victim} == {"c", "k"}
            servers[0].process.kill()
            for call_id in calls:
                record = client.handle(call_id).wait(60)
                assert record.state is RequestState.COMPLETED, record
                assert (record.engine_id, record.attempt > 1) == ("e1", call_id in on_victim)
            assert state_of(monitor, "e0") != "READY"
            for call_id, prompt in prompts.items():
                assert "".join(p.text for p in client.stream(call_id)) == said(prompt, _TOKENS)
            for call_id, body in chats.items():
                reply = httpx.post(
                    f"{servers[1].url}/v1/chat/completions", json=body | {"max_tokens": _TOKENS}, timeout=30
                )
                undisturbed = reply.json()["choices"][0]["message"]["content"]
                assert streamed_text(client, call_id) == undisturbed
            stack.enter_context(sim_server(port=servers[0].port))
            eventually(lambda: state_of(monitor, "e0") == "READY", 30, "e0 READY again")
        finally:
            fleet.stop()
