"""Limits on unfinished calls: the scripts that enforce them, and what each kind of producer sees."""

from __future__ import annotations

from typing import Any

import pytest

from rsm.broker import RequestState, Settings
from rsm.broker.protocol import codec
from rsm.broker.protocol.transitions import Submission, Submitted, Transitions
from tests.support.world import World

BODY = len(codec.encode({"prompt": "hi"}))


@pytest.fixture
def small(world: World) -> World:
    """A namespace with a limit of three calls, two per session."""
    limit(world, max_open_calls=3, max_session_calls=2)
    return world


def limit(world: World, **limits: int) -> None:
    world.settings = world.settings.model_copy(update={"max_body_bytes": 1024, **limits})
    world.transitions = Transitions(world.keys, world.settings)


def submit(world: World, *calls: Submission) -> list[Submitted]:
    return world.run(world.transitions.submit(calls))


def codes(replies: list[Submitted]) -> list[str]:
    return [r.code for r in replies]


def usage(world: World) -> dict[str, int]:
    names = ("open_calls", "open_bytes", "retained_bytes")
    return {name: codec.number(v) for name, v in zip(names, world.db.hmget(world.keys.usage, names), strict=True)}


def settings_with(**values: Any) -> Settings:
    return Settings(**values)


def measured(world: World, **fields: Any) -> None:
    """Sets the values that the routers measure."""
    world.db.hset(world.keys.usage, mapping=fields)


# -- which calls are accepted


@pytest.mark.parametrize(
    ("limits", "name", "accepted"),
    [
        ({"max_open_calls": 3}, "open_calls", 3),
        ({"max_open_bytes": 3 * BODY + 1}, "open_bytes", 3),
        ({"max_session_calls": 2}, "session_calls", 2),
        ({"max_session_bytes": 2 * BODY}, "session_bytes", 2),
        ({}, "", 5),
        (dict.fromkeys(("max_open_calls", "max_open_bytes", "max_session_calls", "max_session_bytes"), 0), "", 5),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_each_limit_holds(
    world: World,
    limits: dict[str, int],
    name: str,
    accepted: int,
    batched: bool,
) -> None:
    limit(world, **limits)
    calls = [world.prepare(f"c{i}", session="s") for i in range(5)]
    replies = submit(world, *calls) if batched else [submit(world, call)[0] for call in calls]
    assert codes(replies) == ["new"] * accepted + ["overloaded"] * (5 - accepted)
    assert {r.bound for r in replies[accepted:]} == ({name} if name else set())
    assert usage(world) == {"open_calls": accepted, "open_bytes": accepted * BODY, "retained_bytes": 0}
    assert len(world.stream()) == accepted
    assert not any(world.db.exists(world.keys.call(f"c{i}")) for i in range(accepted, 5)), "a refusal leaves no trace"


def test_an_end_makes_headroom(small: World) -> None:
    worker = small.worker()
    call = small.start("c0", worker, session="s")
    small.queue("c1", session="s")
    assert small.submit("c2", session="s").code == "overloaded"
    worker.finish(call)
    assert small.submit("c2", session="s").code == "new"
    small.cancel("c1")
    assert small.submit("c3", session="s").code == "new"


def test_a_full_session_does_not_block_others(small: World) -> None:
    replies = submit(small, *(small.prepare(f"c{i}", session="a") for i in range(3)), small.prepare("d0", session="b"))
    assert codes(replies) == ["new", "new", "overloaded", "new"]
    assert replies[2].bound == "session_calls"
    assert replies[2].state is None


def test_a_batch_keeps_its_order(world: World) -> None:
    limit(world, max_open_bytes=1024)
    replies = submit(world, *(world.prepare(f"c{i}", prompt="x" * size) for i, size in enumerate((500, 600, 1))))
    assert codes(replies) == ["new", "overloaded", "overloaded"], "a small call does not overtake a large one"


def test_a_repeated_push_is_never_refused(small: World) -> None:
    calls = [small.prepare(f"c{i}") for i in range(4)]
    assert codes(submit(small, *calls)) == ["new", "new", "new", "overloaded"]
    assert codes(submit(small, *calls)) == ["duplicate", "duplicate", "duplicate", "overloaded"]
    assert codes(submit(small, small.prepare("c0", prompt="other"))) == ["conflict"]


# -- when to try again


def test_the_advice_follows_the_rate_of_ends(small: World) -> None:
    submit(small, *(small.prepare(f"c{i}") for i in range(3)))
    measured(small, turnaround_ms=300)
    replies = submit(small, *(small.prepare(f"d{i}") for i in range(3)))
    assert [r.retry_ms for r in replies] == [100, 200, 300], "three that stay for 300 ms: one ends each 100 ms"
    assert submit(small, small.prepare("d3"))[0].retry_ms == 400


@pytest.mark.parametrize(("turnaround_ms", "ms"), [(1, 50), (1_000_000, 30_000), (0, 1000)])
def test_the_advice_stays_sensible(small: World, turnaround_ms: int, ms: int) -> None:
    submit(small, *(small.prepare(f"c{i}") for i in range(3)))
    measured(small, turnaround_ms=turnaround_ms)
    assert submit(small, small.prepare("d0"))[0].retry_ms == ms


def test_the_advice_of_a_session_is_its_own(small: World) -> None:
    submit(small, *(small.prepare(f"c{i}", session="s") for i in range(2)))
    measured(small, turnaround_ms=300)
    (reply,) = submit(small, small.prepare("c2", session="s"))
    assert (reply.bound, reply.retry_ms) == ("session_calls", 150), "of its two, one ends each 150 ms"


def test_large_calls_wait_for_more_ends(world: World) -> None:
    limit(world, max_open_bytes=1024)
    submit(world, *(world.prepare(f"c{i}", prompt="x" * 90) for i in range(10)))
    measured(world, turnaround_ms=1000)
    small, large = (submit(world, world.prepare(f"d{n}", prompt="x" * n))[0].retry_ms for n in (90, 900))
    assert small < 300
    assert large > 800


def test_the_advice_leaves_half_of_the_time(small: World) -> None:
    submit(small, *(small.prepare(f"c{i}") for i in range(3)))
    measured(small, turnaround_ms=1_000_000)
    seconds, micros = small.db.time()
    now = seconds * 1000 + micros // 1000
    soon, late = submit(small, *(small.prepare(f"d{t}", deadline_ms=now + t) for t in (4000, -1)))
    assert 1000 < soon.retry_ms <= 2000
    assert late.retry_ms == 0, "never, because its deadline has passed"


def test_how_long_calls_stay_is_measured_on_the_timer(small: World) -> None:
    def measure(**before: int) -> list[float]:
        if before:
            measured(small, **before)
        small.run(small.transitions.retain())
        return [float(v or 0) for v in small.db.hmget(small.keys.usage, "turnaround_ms", "refused")]

    seconds, micros = small.db.time()
    now = seconds * 1000 + micros // 1000
    small.db.hset(small.keys.stats, mapping={"started": 100, "waiting_ms": 7, "running_ms": 8})
    assert measure() == [0, 0], "a first measurement has nothing to compare with"
    small.db.hset(small.keys.stats, mapping={"started": 110, "waiting_ms": 1007, "running_ms": 3008})
    assert measure(measured_ms=now - 1000, refused=1000)[0] == 400, "4 s by 10 calls"
    assert 300 < measure()[1] < 400, "after one second, 1/e is left"
    assert measure() == measure(), "a second router on the same timer changes nothing"
    small.db.hset(small.keys.stats, mapping={"started": 111, "running_ms": 4008})
    assert 500 < measure(measured_ms=now - 1000)[0] < 650, (
        "after one of the three seconds of smoothing a new figure counts for 28 %"
    )


# -- bare XADDs


def test_a_raw_push_over_the_limit_fails(small: World) -> None:
    submit(small, *(small.prepare(f"c{i}") for i in range(3)))
    entry = small.push("raw")
    assert small.accept(entry, "raw", inbox="box", stream=True) == "overloaded"
    record = small.record("raw")
    assert (record["state"], record["error_code"]) == ("FAILED", "overloaded")
    assert "RSM_MAX_OPEN_CALLS is reached" in record["error"]
    assert "json" not in record
    (end,) = small.events("box")
    assert (end["call"], end["state"], end["error_code"]) == ("raw", "FAILED", "overloaded")
    assert len(small.stream()) == 3
    assert usage(small)["open_calls"] == 3
    assert small.open_calls("raw") == set()


def test_a_refused_raw_push_may_be_repeated_under_its_id(small: World) -> None:
    worker = small.worker()
    submit(small, *(small.prepare(f"c{i}") for i in range(3)))
    small.accept(small.push("raw"), "raw", stream=True)
    small.cancel("c0")
    entry = small.push("raw")
    assert small.accept(entry, "raw", inbox="box", stream=True) == "new"
    assert small.state("raw") == "PENDING"
    assert small.log("raw") == [], "the end of the refused call is not in this call's log"
    assert small.db.ttl(small.keys.call("raw")) == -1
    small.assign("raw")
    assert worker.finish(worker.take()) == "done"
    assert [n["state"] for n in small.events("box")] == ["COMPLETED"]
    assert small.accept(small.push("raw"), "raw") == "duplicate", "this one was accepted"


def test_a_refused_raw_push_with_another_body_is_a_conflict(small: World) -> None:
    submit(small, *(small.prepare(f"c{i}") for i in range(3)))
    small.accept(small.push("raw"), "raw")
    small.cancel("c0")
    body = '{"prompt":"other"}'
    assert small.accept(small.push("raw", body), "raw", body) == "conflict"


def test_calls_that_others_run_are_counted_and_not_refused(small: World) -> None:
    for i in range(4):
        assert small.run(small.transitions.transition(f"t{i}", RequestState.PENDING, "s"))[0]
    assert usage(small)["open_calls"] == 4
    assert small.submit("c0").code == "overloaded"


def test_a_session_has_a_field_only_while_calls_are_open(small: World) -> None:
    small.submit("c0", session="s")
    assert small.db.hgetall(small.keys.session_bytes) == {b"s": str(BODY).encode()}
    small.cancel("c0")
    assert not small.db.exists(small.keys.session_bytes)


# -- settings


@pytest.mark.parametrize("name", ["max_open_bytes", "max_session_bytes", "max_dead_bytes"])
def test_a_limit_allows_the_largest_body(name: str) -> None:
    with pytest.raises(ValueError, match=f"RSM_{name.upper()}"):
        settings_with(**{name: 2000, "max_body_bytes": 2001})
    for enough in (0, 2001):
        assert settings_with(**{name: enough, "max_body_bytes": 2001}).max_body_bytes == 2001
