"""The router's admission decision, without Redis: which engines a call may go to."""

from __future__ import annotations

from typing import Any

from rsm.broker import Settings
from rsm.broker.protocol.snapshot import EngineView, SessionView, Share
from rsm.router.admission import Admission
from rsm.router.placement import Chooser, Decision
from rsm.router.policies import create_policy
from rsm.router.views import CallView

LEAST_LOADED = Settings(policy="least_loaded")


def engine(engine_id: str, spoken_for: float = 0.0, kv_tokens: int = 1000, **fields: Any) -> EngineView:
    return EngineView(engine_id, "READY", "m", kv_tokens=kv_tokens, spoken_for=[spoken_for], running=1, **fields)


def spoken_for(c: Chooser, engine_id: str) -> float:
    return sum(c.fleet[engine_id].spoken_for)


def chooser(*fleet: EngineView, factor: float = 1.0) -> Chooser:
    made = Chooser(create_policy(LEAST_LOADED), Admission(factor))
    made.see(fleet)
    return made


def place(c: Chooser, *tokens: int, session: SessionView | None = None) -> list[Decision]:
    return c.place([CallView("s", "m", n) for n in tokens], {"s": session} if session else {}, 0.0)


def chosen(decisions: list[Decision]) -> list[str]:
    return [d.choice.engine for d in decisions if d.choice]


def test_a_call_goes_where_its_context_fits_or_is_throttled() -> None:
    c = chooser(engine("a", 900), engine("b", 500, running_tokens=10**6))
    first, second = place(c, 300)[0], place(c, 501)[0]
    assert first.choice
    assert (first.choice.engine, first.context, first.new) == ("b", 300, 300), "whatever its load"
    assert second.choice
    assert (second.choice.throttle, second.choice.engine) == (True, "")
    assert "501 tokens" in second.choice.why
    assert spoken_for(c, "b") == 800


def test_a_factor_makes_headroom() -> None:
    assert chosen(place(chooser(engine("a", 900), factor=1.5), 600)) == ["a"]
    assert chosen(place(chooser(engine("a", 900), factor=0.5), 1)) == [""]


def test_a_session_goes_where_it_is_cached_without_question() -> None:
    there = SessionView(shares={"a": Share(400, cached=True), "b": Share(9, cached=False)})
    c = chooser(engine("a", 5000), engine("b"))
    assert chosen(place(c, 800, session=there)) == ["a"]
    assert spoken_for(c, "a") == 5400, "its share was counted already"


def test_contexts_of_worse_tiers_are_headroom_and_they_are_admitted_again() -> None:
    full = EngineView("a", "READY", "m", kv_tokens=1000, spoken_for=[200, 0, 900], running=3)
    level = {n: SessionView(level=n) for n in range(4)}
    assert [chosen(place(chooser(full), 500, session=level[n])) for n in range(3)] == [["a"], ["a"], [""]]
    first, last = CallView("s", "m", 500, priority=-1), CallView("s", "m", 500, priority=1)
    assert chosen(chooser(full).place([first], {"s": level[3]}, 0.0)) == ["a"], "an earlier class is the best tier"
    assert chosen(chooser(full).place([last], {"s": level[0]}, 0.0)) == [""], "a later class is the last tier"
    there = SessionView(level=2, shares={"a": Share(450, cached=True, tier=2)})
    assert chosen(place(chooser(full), 800, session=there)) == ["a"], "its own tier does not matter"
    assert chosen(place(chooser(full), 801, session=there)) == [""], "better tiers do"


def test_later_calls_of_a_batch_are_cached_where_the_first_went() -> None:
    c = chooser(engine("a", 400), engine("b", 500))
    first, second = place(c, 550, 600, session=SessionView(resident={"a": 500}))
    assert chosen([first, second]) == ["a", "a"]
    assert (second.context, second.new) == (600, 100), "what the session has cached is shared"
    assert spoken_for(c, "a") == 400 + 550 + 100


def test_what_is_left_of_its_own_context_is_headroom() -> None:
    fading = SessionView(shares={"a": Share(200, cached=False)})
    assert chosen(place(chooser(engine("a", 900)), 300)) == [""]
    assert chosen(place(chooser(engine("a", 900)), 300, session=fading)) == ["a"]


def test_the_answer_counts_as_long_as_others_of_late() -> None:
    c = chooser(engine("a", completion_tokens=90.0))
    assert place(c, 10)[0].context == 100
    assert place(c, 10, session=SessionView(completion_tokens=7.0, completed=1))[0].context == 17


def test_an_engine_of_unknown_size_is_never_the_reason_to_wait() -> None:
    assert chosen(place(chooser(engine("a", 10**9, kv_tokens=0)), 10**6)) == ["a"]


def test_a_context_larger_than_any_cache_goes_where_nothing_runs() -> None:
    idle = EngineView("b", "READY", "m", kv_tokens=1000, spoken_for=[800])
    assert chosen(place(chooser(engine("a")), 1500)) == [""]
    assert chosen(place(chooser(engine("a"), idle), 1500)) == ["b"]
