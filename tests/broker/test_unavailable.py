"""A Redis that is not there: every view gives a clear error that names the server and says what to start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rsm.broker import AccessDenied, AsyncClient, BrokerUnavailable, Client, Settings
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.monitor import Monitor
from rsm.engine import GlobalProcessTable, KVCacheCoordinator, RequestLifecycleManager, SessionManager
from tests.support.roles import Roles

VIEWS: dict[str, Callable[[Settings], object]] = {
    "engine": lambda s: Monitor(s).engine("e1"),
    "engines": lambda s: Monitor(s).engines(),
    "call": lambda s: Monitor(s).call("c1"),
    "active_calls": lambda s: Monitor(s).active_calls(),
    "running_calls": lambda s: Monitor(s).running_calls(),
    "sessions": lambda s: Monitor(s).sessions(),
    "session": lambda s: Monitor(s).session("s1"),
    "usage": lambda s: Monitor(s).usage(),
    "stats": lambda s: Monitor(s).stats(),
    "dead letters": lambda s: DeadLetters(s).ls(),
    "replay": lambda s: DeadLetters(s).replay("c1"),
    "process table": lambda s: GlobalProcessTable(s).get("s1"),
    "programs": lambda s: GlobalProcessTable(s).programs(),
    "session manager": lambda s: SessionManager(GlobalProcessTable(s)).start_session(),
    "lifecycle": lambda s: RequestLifecycleManager(s).get_running_requests(),
    "start request": lambda s: RequestLifecycleManager(s).start_request("r1", "s1", "e1"),
    "coordinator": lambda s: KVCacheCoordinator(settings=s).get_cache_stats(),
    "record usage": lambda s: KVCacheCoordinator(settings=s).record_cache_usage("s1", "e1", 9),
    "best engine": lambda s: KVCacheCoordinator(settings=s).get_best_engine_for_session("s1", ["e1"], 9000),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("url", ["unix://{folder}/none.sock", "redis://someone:geheim@127.0.0.1:1/3"])
def test_every_view_says_where_it_looked(tmp_path: Path, name: str, url: str) -> None:
    away = Settings().with_redis(url.format(folder=tmp_path))
    with pytest.raises(BrokerUnavailable) as caught:
        VIEWS[name](away)
    said = str(caught.value)
    assert ("127.0.0.1:1/3" if "127" in url else f"{tmp_path}/none.sock") in said
    assert "`rsm up`" in said
    assert "RSM_REDIS_URL" in said
    assert "geheim" not in said
    assert said.count(". ") == 1, "what is wrong, and what to do"


async def test_clients_say_the_same(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/none.sock"
    with Client(url, redis_timeout=0.05) as client, pytest.raises(BrokerUnavailable, match="did not answer for"):
        client.submit("x")
    async with AsyncClient(url, redis_timeout=0.05) as other:
        with pytest.raises(BrokerUnavailable, match=r"did not answer for 0.05 s .*`rsm up`"):
            await other.submit("x")


def test_a_user_without_permissions_gets_a_clear_error(settings: Settings, roles: Roles) -> None:
    with pytest.raises(AccessDenied, match="`rsm acl`"):
        Monitor(roles.settings("pusher")).stats()
