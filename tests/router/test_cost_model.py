"""How long a call would take on each engine, and the policy that uses it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rsm.broker import Settings
from rsm.broker.protocol.rules import rank_of
from rsm.broker.protocol.snapshot import Ahead, CacheUse, EngineView, SessionView, Speed
from rsm.router.cost_model import CostModel, Weights, costs_text, reusable
from rsm.router.policies.cost import Cost
from rsm.router.views import CallView

SPEED = Speed(0.01, 1e-4, 1e-5)
NOBODY = SessionView()
ALONE = Weights(others=0, keep=0)


def engine(engine_id: str = "a", **fields: Any) -> EngineView:
    return EngineView(engine_id, "READY", "m", **{"max_num_seqs": 4, "kv_tokens": 100_000, "speed": SPEED, **fields})


def call(tokens: int = 1000, **more: Any) -> CallView:
    return CallView("s", "m", tokens, **more)


def cost(view: EngineView, session: SessionView = NOBODY, c: CallView | None = None, w: Weights = ALONE) -> float:
    return CostModel(w).costs(c or call(), [view], session, 0.0)[view.id]


def with_cache(tokens: int, computed: int = 0, where: str = "a") -> SessionView:
    return SessionView(resident={where: tokens}, used={where: CacheUse(1.0, computed)})


def test_a_faster_engine_costs_less() -> None:
    slow = engine("b", speed=Speed(0.02, 3e-4, 1e-5))
    assert cost(engine()) < cost(slow)


def test_cached_tokens_are_a_discount() -> None:
    assert cost(engine()) - cost(engine(), with_cache(600)) == pytest.approx(600 * SPEED.token_s)


def test_tokens_that_an_engine_computed_since_have_evicted_the_cache() -> None:
    views = [engine(computed=n) for n in (0, 99_700, 100_001)]
    assert [reusable(call(), v, with_cache(600)) for v in views] == [600, 300, 0]
    assert reusable(call(), engine(kv_tokens=0, computed=10**9), with_cache(600)) == 600, "the cache size is unknown"
    assert reusable(call(), engine(kv_tokens=0, computed=1 << 40), with_cache(600)) == 0, "its process has restarted"
    assert reusable(call(), engine(reuse_found=0.5), with_cache(600)) == 300, "recently, half of it was there"
    assert reusable(call(500), engine(), with_cache(600)) == 499, "one token is always computed"


def test_only_what_is_ahead_in_the_queue_is_waited_for() -> None:
    view = engine(running=4, ahead={rank_of(0, 3): Ahead(5, 50_000)})
    urgent = cost(view, SessionView(level=0))
    assert cost(view, SessionView(level=3)) - urgent > 5
    assert cost(view, SessionView(level=4)) - urgent > 5
    first = cost(view, SessionView(level=4), call(priority=-1))
    assert first == pytest.approx(urgent), "the class precedes the level"


def test_full_slots_are_waited_for_and_free_ones_are_not() -> None:
    assert cost(engine(running=4)) > cost(engine(running=3))
    assert cost(engine(prefill_s=2.0)) == pytest.approx(cost(engine()) + 2.0)


def test_the_delay_of_others_counts() -> None:
    busy = engine(running=3)
    alone, social = cost(busy), cost(busy, w=Weights(others=1, keep=0))
    assert social - alone >= 3 * 1000 * SPEED.token_s


def test_a_call_that_evicts_a_needed_cache_costs_more() -> None:
    w = Weights(others=0, keep=1)
    ages = [cost(engine(cache_age_s=age), w=w) for age in (0.0, 60.0, 1e9, float("inf"))]
    assert ages[0] > ages[1] > ages[2] == pytest.approx(ages[3])
    assert ages[0] - ages[3] == pytest.approx(1000 * SPEED.token_s)


def test_an_unmeasured_engine_counts_as_the_mean_of_the_others() -> None:
    views = [engine("a"), replace(engine("b"), speed=None)]
    costs = CostModel(ALONE).costs(call(), views, NOBODY, 0.0)
    assert costs["a"] == pytest.approx(costs["b"])


def test_an_engine_that_stays_unmeasured_counts_as_the_current_mean() -> None:
    """Even without a new view of it: a fleet in virtual time updates only engines that have changed."""
    model, silent = CostModel(ALONE), replace(engine("b"), speed=None)
    first = model.costs(call(), [replace(engine("a"), speed=None), silent], NOBODY, 0.0)["b"]
    later = model.costs(call(), [engine("a", speed=Speed(0.001, 1e-5, 1e-6)), silent], NOBODY, 10.0)
    assert later["b"] == pytest.approx(later["a"])
    assert later["b"] < first / 5


def test_answers_are_as_long_as_the_sessions_own_and_the_fleets_before() -> None:
    model = CostModel()
    model.costs(call(), [engine(completion_tokens=100)], NOBODY, 0.0)
    assert model.answer(NOBODY) == 100
    assert 100 < model.answer(SessionView(completed=2, completion_tokens=300)) < 300
    assert model.answer(SessionView(completed=1000, completion_tokens=300)) == pytest.approx(300, rel=0.01)


# -- the policy


def choose(engines: list[EngineView], session: SessionView = NOBODY, tokens: int = 1000) -> Any:
    return Cost(Settings()).choose(call(tokens), engines, session)


def test_a_session_stays_where_its_cache_is_and_leaves_a_hot_engine() -> None:
    session = with_cache(20_000)
    assert choose([engine("a"), engine("b")], session, 20_500).engine == "a"
    hot = engine("a", running=4, prefill_s=9.0)
    left = choose([hot, engine("b")], session, 20_500)
    assert (left.engine, left.hit, left.reuse) == ("b", False, 0)
    assert left.costs["a"] > left.costs["b"]


def test_a_session_leaves_an_engine_that_takes_no_calls() -> None:
    assert choose([engine("b")], with_cache(20_000), 20_500).engine == "b", "drained and dead ones are not offered"


def test_of_equal_engines_the_one_that_has_the_prompt_is_chosen_whatever_it_has_served() -> None:
    """A few tokens take almost no time, but they are work."""
    views = [engine("a", served=9), engine("b", served=0)]
    assert choose(views, with_cache(100)).engine == "a"


def test_equal_engines_take_turns() -> None:
    assert choose([engine("a", served=3), engine("b", served=2)]).engine == "b"


def test_costs_are_recorded_within_a_limit() -> None:
    text = costs_text({f"e{i}": i / 10 for i in range(64)}, "e7")
    assert text.split()[:3] == ["e7=700", "e0=0", "e1=100"]
    assert len(text.split()) == 9
    assert len(costs_text({"x" * 100 + str(i): 1.0 for i in range(64)}, "x" * 100 + "0")) <= 192
    assert costs_text({}, "e1") == ""
