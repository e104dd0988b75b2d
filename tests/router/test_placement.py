"""The router's decisions, without Redis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from rsm.broker import Settings
from rsm.broker.protocol.rules import rank_of
from rsm.broker.protocol.snapshot import Ahead, EngineView, SessionView, Speed
from rsm.router.placement import PARKED, Chooser, Decision
from rsm.router.policies import Policy, create_policy
from rsm.router.views import CallView, Choice

DEFAULTS = Settings()


def engine(engine_id: str, state: str = "READY", model: str = "m", **fields: Any) -> EngineView:
    return EngineView(engine_id, state, model, **fields)


def chooser(name: str = "least_loaded", *fleet: EngineView) -> Chooser:
    made = Chooser(create_policy(DEFAULTS.model_copy(update={"policy": name})))
    made.see(fleet)
    return made


def engines_of(decisions: Sequence[Decision]) -> list[str]:
    return [d.choice.engine if d.choice else "" for d in decisions]


def test_a_batch_counts_what_it_placed_itself() -> None:
    c = chooser("least_loaded", *(engine(e) for e in "abc"))
    placed = engines_of(c.place([CallView("s", "m", 10)] * 30, {}, 0.0))
    assert Counter(placed) == {"a": 10, "b": 10, "c": 10}
    assert {e.queued for e in c.fleet.values()} == {10}
    again = engines_of(c.place([CallView("s", "", 500), *[CallView("s", "m", 10)] * 2], {}, 0.0))
    assert Counter(again) == {"a": 1, "b": 1, "c": 1}, "also in the next batch, for any model"
    c.see([engine("a", queued_tokens=1), engine("b")])
    assert engines_of(c.place([CallView("s", "m", 10)], {}, 0.0)) == ["b"], "until the next snapshot of the fleet"


def test_calls_wait_for_a_known_model_and_are_refused_for_an_unknown_one() -> None:
    c = chooser()
    assert c.place([CallView("s", "m", 1)], {}, 0.0) == [Decision(None)], "engines may still start"
    c.see([engine("a", state="DRAINING"), engine("b", model="other")])
    known, any_model, unknown = c.place([CallView("s", model, 1) for model in ("m", "", "none")], {}, 0.0)
    assert known == Decision(None)
    assert engines_of([any_model]) == ["b"]
    assert unknown.refusal == "No engine serves the model 'none'. Available models: m, other."
    assert PARKED


def test_one_engine_can_be_updated() -> None:
    c = chooser("least_loaded", engine("a"), engine("b"))
    c.place([CallView("s", "m", 1)], {}, 0.0)
    c.update(engine("a", queued_tokens=99))
    c.update(engine("b", queued_tokens=5))
    assert engines_of(c.place([CallView("s", "m", 1)], {}, 0.0)) == ["b"]
    c.update(engine("b", state="DRAINING"))
    assert engines_of(c.place([CallView("s", "m", 1)], {}, 0.0)) == ["a"]
    c.update(engine("c", model="new"))
    assert c.models == {"m", "new"}
    assert engines_of(c.place([CallView("s", "new", 1)], {}, 0.0)) == ["c"]


def test_a_binding_holds_for_the_rest_of_the_batch() -> None:
    c = chooser("autellix", engine("a"), engine("b"))
    sessions = {"s": SessionView()}
    first, second = c.place([CallView("s", "m", 5000)] * 2, sessions, 0.0)
    assert first.choice
    assert second.choice
    assert (second.choice.engine, second.choice.hit, second.seen) == (first.choice.engine, True, first.choice.engine)
    assert (first.seen, sessions) == ("", {"s": SessionView()}), "the argument is not changed"


class Reckoner(Policy):
    """Returns costs, and records the time."""

    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        costs = {e.id: float(sum(a.tokens for a in e.ahead.values())) for e in engines}
        best = min(costs, key=lambda e: costs[e])
        return Choice(best, f"at {self.now:g}", reuse=300, costs=costs, throttle=call.prompt_tokens > 5000)


def test_work_is_counted_by_rank_for_policies_with_costs() -> None:
    c = Chooser(Reckoner(DEFAULTS))
    c.see([engine("a", ahead={7: Ahead(1, 100)}), engine("b", ahead={7: Ahead(1, 101)})])
    first, second = c.place([CallView("s", "m", 1000, priority=-1)] * 2, {"s": SessionView(level=2)}, 7.5)
    assert engines_of([first, second]) == ["a", "b"]
    assert first.choice
    assert first.choice.why == "at 7.5"
    assert c.fleet["a"].ahead == {7: Ahead(1, 100), rank_of(-1, 2): Ahead(1, 700)}


def test_a_throttled_call_is_no_load() -> None:
    c = Chooser(Reckoner(DEFAULTS))
    c.see([engine("a")])
    (throttled,) = c.place([CallView("s", "m", 5001)], {}, 0.0)
    assert throttled.choice
    assert throttled.choice.throttle
    assert c.fleet["a"].queued == 0


def test_ranks_are_in_the_order_of_the_queue() -> None:
    ranks = [rank_of(p, level) for p, level in ((-200, 0), (-128, 1), (-1, 15), (0, 0), (0, 1), (5, 0), (127, 15))]
    assert ranks == sorted(set(ranks))
    assert (ranks[0], ranks[-1]) == (0, 256 * 16 - 1)


def test_what_a_speed_means() -> None:
    view = engine("a", max_num_seqs=8, speed=Speed(0.01, 0.0005, 0.001))
    assert view.prefill_tps == 2000
    assert view.decode_tps == pytest.approx(8 / 0.018)
    assert (engine("a").prefill_tps, engine("a").decode_tps) == (0.0, 0.0)
