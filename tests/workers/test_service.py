"""Service units: what a call is charged, from the unit's formula to the process table."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import redis

from rsm.broker import InvalidRequest, RequestState, Settings
from rsm.broker.protocol.keys import Keys
from rsm.workers.backends.base import Job, Outcome
from rsm.workers.backends.sim.backend import SimBackend
from rsm.workers.runtime.calls import Calls
from rsm.workers.runtime.publisher import Ended, Item
from rsm.workers.scheduling.service import KvTokens, ServiceUnit, Time, Tokens, Used, Work, charge, create_unit
from tests.support.world import World


def test_tokens_are_uncached_prompt_and_twice_the_answer() -> None:
    assert Tokens().service(Used(1000, 50, 400, ran_s=9)) == 700
    assert Tokens().service(Used(1000, 50, 1200)) == 100, "never less than the answer"


def test_work_counts_a_prompt_token_as_an_eighth() -> None:
    assert Work().service(Used(1000, 50, 600)) == 100 + 100
    assert isinstance(create_unit("work"), Work)


def test_time_is_in_ms() -> None:
    assert Time().service(Used(1000, 50, ran_s=1.5)) == 1500


def test_kv_is_tokens_times_seconds() -> None:
    assert KvTokens().service(Used(1000, 100, ran_s=4, first_s=1)) == 4000 + 100 * 3 / 2
    assert KvTokens().service(Used(1000, 100, ran_s=4)) == 4000 + 200, "the time of the first token is unknown"
    assert KvTokens().service(Used(1000, 0, ran_s=4, first_s=9)) == 4000


class Odd(ServiceUnit):
    """A custom unit."""

    def service(self, used: Used) -> float:
        return {0: float("nan"), 1: -5.0, 2: float("inf"), 3: 2.6}[used.prompt_tokens]


def test_a_charge_is_a_whole_number_whatever_a_unit_returns(caplog: pytest.LogCaptureFixture) -> None:
    assert [charge(Odd(), Used(n, 0)) for n in range(4)] == [0, 0, 1 << 50, 3]
    assert charge(Odd(), Used(4, 0)) == 0, "a unit that fails does not fail the call"
    assert "Odd raised KeyError" in caplog.text


class Unfinished(ServiceUnit):
    pass


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("users_own_units")
    vars(module).update(Odd=Odd, Unfinished=Unfinished, function=charge)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_units_by_name(plugin: str) -> None:
    assert [type(create_unit(n)) for n in ("tokens", "time", "kv", f"{plugin}:Odd")] == [Tokens, Time, KvTokens, Odd]


@pytest.mark.parametrize(
    "name",
    ["", "joules", "no.such.module:Class", "rsm.workers.scheduling.service", "rsm.workers.scheduling.service:No", ":X"],
)
def test_no_such_unit(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"There is no service unit .* Use one of tokens, work, time, kv, or"):
        create_unit(name)


@pytest.mark.parametrize("attribute", ["function", "Unfinished", "__name__"])
def test_something_that_is_not_a_unit(plugin: str, attribute: str) -> None:
    with pytest.raises(InvalidRequest, match=r"is not a subclass of rsm.workers.ServiceUnit"):
        create_unit(f"{plugin}:{attribute}")


def test_the_level_bounds_fit_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    default = Settings().level_bounds
    monkeypatch.setenv("RSM_SERVICE_UNIT", "kv")
    assert min(Settings().level_bounds) == 10 * min(default)
    monkeypatch.setenv("RSM_LEVEL_BOUNDS", "1 2 3")
    assert Settings().level_bounds == (1, 2, 3)
    assert Settings(service_unit="time", level_bounds=default).level_bounds == default


class Answers(SimBackend):
    """Reports for each call that it ran for two seconds."""

    async def run(self, job: Job, emit: Any) -> Outcome:
        return Outcome("stop", prompt_tokens=100, completion_tokens=10, cached_tokens=40, running_ms=2000.0)


@pytest.mark.parametrize(("unit", "service"), [("tokens", 80), ("time", 2000), ("kv", 210)])
async def test_a_worker_charges_in_its_unit(
    world: World, settings: Settings, db: redis.Redis, unit: str, service: int
) -> None:
    put: list[Item] = []
    keys = Keys(settings.namespace)
    calls = Calls(Answers(), db, keys, put.append, lambda: None, lambda _: None, create_unit(unit))
    worker = world.worker()
    calls.start([world.start("c1", worker, session="s")])
    await calls.settle(5)
    ended = put[0]
    assert isinstance(ended, Ended)
    assert (ended.finish.state, ended.finish.service) == (RequestState.COMPLETED, service)
    world.run(world.transitions.finish(worker.engine, [ended.finish]))
    assert world.session("s").ints("service") == (service,)
