"""Tables: what they show, in 80 columns and wide."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from rsm.broker import CallRecord, CallResult, Client, RequestState
from rsm.broker.protocol.ids import SHORTEST_PART, named_by, new_id, short_form
from rsm.broker.views.monitor import ActiveCall
from rsm.cli import tables
from rsm.cli.output import cell
from rsm.cli.short_ids import WHOLE, ShortIds
from tests.support.rsm_command import RSM, Deployment, typed
from tests.support.waiting import eventually


def printed(renderable: Any, width: int = 200) -> str:
    out = Console(file=io.StringIO(), width=width)
    out.print(renderable)
    return str(out.file.getvalue())  # type: ignore[attr-defined]


def record(**changes: Any) -> CallRecord:
    base: dict[str, Any] = {"request_id": "c", "state": RequestState.RUNNING, "session_id": "s", "submitted_ms": 1000}
    return CallRecord(**{**base, **changes})


def test_calls_table_shows_how_long_they_run_or_wait() -> None:
    calls = [
        ActiveCall("r", "running", "e1", record(request_id="r", started_ms=3000)),
        ActiveCall("w", "parked", "", record(request_id="w", state=RequestState.PENDING)),
    ]
    shown = printed(tables.calls_table(calls, 2, now_ms=5000))
    assert "2.0 s" in shown
    assert "4.0 s" in shown
    assert "(none ready)" in shown
    assert "1 running, 1 waiting, 2 not yet routed" in shown
    assert [c["where"] for c in json.loads(json.dumps(tables.calls_json(calls)))] == ["running", "parked"]


def test_a_throttled_call_differs_from_one_that_no_engine_serves() -> None:
    waiting = record(request_id="h", state=RequestState.PENDING, why="no headroom")
    shown = printed(tables.calls_table([ActiveCall("h", "throttled", "", waiting)], 0, now_ms=5000))
    assert "(throttled)" in shown
    assert "0 running, 1 waiting (1 throttled until there is headroom)" in shown
    assert "why it waits" in printed(tables.call_table(waiting, now_ms=5000))


def test_call_table_shows_what_happened_to_the_call() -> None:
    result = CallResult("c", "s", "e1", "[bold]text[/]", [1], 9, 2, 4, "stop", 3.0, 1.0, 1.5, 2)
    ended = record(
        state=RequestState.CANCELLED, engine_id="e1", why="it is [here]", attempt=2, started_ms=2000, finished_ms=4000,
        assigned_ms=1100, error="enough", result=result, stolen_from=("e7", "e8"), costs={"e1": 0.1, "e7": 2.5},
    )  # fmt: skip
    shown = printed(tables.call_table(ended, now_ms=9000))
    for part in (
        "it is [here]",
        "enough",
        "100 ms",
        "1.0 s",
        "2.0 s",
        "2 out, 9 in, 4 cached",
        "[bold]text[/]",
        "8.0 s",
        "e7, e8",
        "e1 0.1 s, e7 2.5 s",
    ):
        assert part in shown
    assert "deadline" not in shown


def test_sessions_table_shows_what_the_scheduler_uses() -> None:
    row = {
        "session_id": "sub", "parent": "main", "program": "main", "service": 5000, "level": 2, "waited_ms": 3000,
        "ran_ms": 2000, "wait_ratio": 1.5, "active": 7, "engines": ["e1", "e2"], "completed": 1, "cancelled": 2,
        "failed": 3, "resident_tokens": {"e1": 40}, "last_arrival_ms": 1000, "last_completion_ms": 0,
    }  # fmt: skip
    shown = printed(tables.sessions_table([row], 5000, "kv"), width=200)
    for part in ("main", "SERVICE (kv)", "5000", "3.0 s", "2.0 s", "1.50", "e1, e2", "e1 (40 tokens)", "4.0 s ago"):
        assert part in shown


def test_an_empty_table_is_a_message() -> None:
    assert "rsm up" in printed(tables.engines_table([], 0))
    assert "No sessions" in printed(tables.sessions_table([], 0))
    assert "No dead letters" in printed(tables.dead_table([], 0))


# -- 80 columns

LONG = [f"customer-support-conversation-{i}-of-a-quite-long-name" for i in range(3)]
ENGINES = [f"gpu-host-{i}.rack-7.example-engine" for i in range(3)]
NOW = 2_000_000_000_000


def lines(renderable: Any, width: int = 80) -> list[str]:
    return [line.rstrip() for line in printed(renderable, width).splitlines()]


def active_calls() -> list[ActiveCall]:
    made = [new_id() for _ in range(20)]
    calls = []
    for i, call_id in enumerate([*made, *LONG, "1732871234567-0"]):
        session = LONG[i % 3] if i % 2 else call_id
        found = record(
            request_id=call_id, session_id=session, submitted_ms=NOW - 110_000, level=15, prompt_tokens=131_072
        )
        calls.append(ActiveCall(call_id, "running" if i % 2 else "queue", ENGINES[i % 3], found))
    return calls


def engine(engine_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "engine_id": engine_id, "state": "DRAINING", "model": "org/A-Model-Of-A-Long-Name-Instruct-AWQ", "node": "n",
        "pid": 1, "running": 1024, "max_num_seqs": 1024, "queued": 123_456, "queued_tokens": 10**9, "kv_usage": 1.0,
        "tokens_per_s": 123_456.0, "prefill_tps": 1.0, "decode_tps": 1.0, "served": 10**7, "error": "",
        "heartbeat_ms": NOW - 119_000, **changes,
    }  # fmt: skip


def session(session_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "session_id": session_id, "parent": "", "program": session_id, "service": 123_456_789, "level": 15,
        "waited_ms": 119_000, "ran_ms": 119_000, "wait_ratio": 1.5, "active": 0, "engines": [], "completed": 10_000,
        "cancelled": 0, "failed": 0, "resident_tokens": {}, "last_arrival_ms": NOW - 119_000, "last_completion_ms": 0,
        **changes,
    }  # fmt: skip


def letter(call_id: str) -> dict[str, Any]:
    return {
        "entry": "1732871234567-12", "request_id": call_id, "session_id": call_id, "attempts": 3,
        "died_ms": NOW - 119_000, "body_bytes": 10**7, "replayable": True, "error_code": "attempts_exhausted",
        "error": "its engine died " * 20,
    }  # fmt: skip


def the_lists() -> dict[str, tuple[Any, int]]:
    """Each list in its narrow form, and the number of its lines if no row is folded."""
    calls, ids = active_calls(), [*LONG, *(new_id() for _ in range(5))]
    engines = [engine(e) for e in ENGINES]
    failed = [engine(e, error="CUDA out of memory. " * 20 + "\nand more") for e in ENGINES]
    sessions = [session(i, active=300, engines=ENGINES) for i in ids]
    return {
        "ps": (tables.calls_table(calls, 10**6, NOW, room=80), len(calls) + 2),
        "engines": (tables.engines_table(engines, NOW, room=80), len(engines) + 1),
        "engines with errors": (tables.engines_table(failed, NOW, room=80), 2 * len(failed) + 1),
        "sessions": (tables.sessions_table(sessions, NOW, room=80), len(sessions) + 2),
        "dead ls": (tables.dead_table([letter(i) for i in ids], NOW, room=80), len(ids) + 1),
    }


@pytest.mark.parametrize("name", the_lists())
def test_a_list_fits_80_columns_and_a_row_is_a_line(name: str) -> None:
    renderable, expected = the_lists()[name]
    shown = lines(renderable)
    assert max(map(len, shown)) <= 80
    assert len(shown) == expected, "\n".join(shown)


def test_the_ids_in_a_list_of_calls_are_unique() -> None:
    calls = active_calls()
    ids = [c.request_id for c in calls]
    rows = lines(tables.calls_table(calls, 0, NOW, room=80))[1:-1]
    for call, row in zip(calls, rows, strict=True):
        assert named_by(row.split()[0].strip("…"), ids) == [call.request_id]


def test_wide_lists_are_neither_cut_nor_folded() -> None:
    calls = active_calls()
    rows = lines(tables.calls_table(calls, 0, NOW), width=1000)[1:-1]
    assert [row.split()[:2] for row in rows] == [[c.request_id, c.record.session_id] for c in calls]
    (_, row) = lines(tables.dead_table([letter("d")], NOW), width=1000)
    assert row.endswith(("its engine died " * 20).rstrip())
    assert "1024/1024" in lines(tables.engines_table([engine("e1")], NOW), width=1000)[1]


def test_a_call_without_a_session_says_so() -> None:
    mine = ActiveCall("c1", "running", "e1", record(request_id="c1", session_id="c1"))
    assert lines(tables.calls_table([mine], 0, NOW, room=80))[1].split()[:2] == ["c1", "(own)"]


def test_more_calls_than_the_limit() -> None:
    calls = active_calls()
    assert lines(tables.calls_table(calls, 0, NOW, limit=24))[-1].endswith("; the first 24 (see --limit)")
    assert "--limit" not in lines(tables.calls_table(calls, 0, NOW, limit=25))[-1]


def test_engines_that_ended_in_order_are_hidden_and_counted() -> None:
    found = [engine("e1", state="READY"), engine("e2", state="STOPPED"), engine("e3", state="DEAD")]
    found.append(engine("e4", state="STOPPED"))
    shown = lines(tables.engines_table(found, NOW, everything=False), width=1000)
    assert [row.split()[0] for row in shown] == ["ENGINE", "e1", "Not"]
    assert shown[-1] == "Not shown: 2 stopped and 1 dead; --all shows them."
    assert [row.split()[0] for row in lines(tables.engines_table(found, NOW), 1000)] == [
        "ENGINE",
        "e1",
        "e2",
        "e3",
        "e4",
    ]
    assert "Not shown: 1 dead" in printed(tables.engines_table([found[2]], NOW, everything=False))


def test_engines_that_ended_with_an_error_are_shown_with_it() -> None:
    error = "CUDA out of memory.\nTried to allocate 9 GiB."
    found = [engine("e1", state="READY"), engine("e2", state="STOPPED", error=error), engine("e3", state="DEAD")]
    found.append(engine("e4", state="DEAD", error="\x1b[31mits process was killed"))
    shown = lines(tables.engines_table(found, NOW, everything=False, room=80))
    assert [row.split()[0] for row in shown] == ["ENGINE", "e1", "e2", "CUDA", "e4", "[31mits", "Not"]
    assert shown[3] == "  CUDA out of memory."
    assert shown[-1] == "Not shown: 1 dead; --all shows them."
    head, _, stopped, dead, _ = lines(tables.engines_table(found, NOW, everything=False), width=1000)
    assert head.split()[-1] == "ERROR"
    assert stopped.endswith("CUDA out of memory. Tried to allocate 9 GiB.")
    assert dead.endswith("its process was killed")


def test_running_programs_come_first_then_the_latest() -> None:
    rows = [
        session("old", last_arrival_ms=1000),
        session("ended-late", last_arrival_ms=1000, last_completion_ms=9000),
        session("sub2", program="main", parent="sub1", active=2, last_arrival_ms=3000),
        session("sub1", program="main", parent="main", last_arrival_ms=2000),
        session("main", last_arrival_ms=1500),
        session("runs", active=1, last_arrival_ms=500),
        session("orphan", program="orphan", parent="expired", last_arrival_ms=4000),
    ]
    ordered = tables.running_first(rows)
    assert [s["session_id"] for s in ordered] == ["main", "sub1", "sub2", "runs", "ended-late", "orphan", "old"]
    shown = lines(tables.sessions_table(ordered, NOW, room=80))
    assert shown[1].startswith("main ")
    assert shown[2].startswith("  sub1 ")
    assert shown[3].startswith("    sub2 ")
    assert shown[-1] == "5 programs, 2 with unfinished calls; service in tokens"


# -- ids


def test_short_forms_of_generated_ids_are_unique_endings() -> None:
    made = [new_id() for _ in range(5000)]
    short = {short_form(i) for i in made}
    assert len(short) == len(made)
    assert all(i.endswith(short_form(i)) for i in made)
    assert min(map(len, short)) >= SHORTEST_PART
    assert short_form("01a226e43fe1-00000a-3e93dd3bd4") == "a-3e93dd3bd4"
    assert short_form("01a226e43fe1-000000-3e93dd3bd4") == "0-3e93dd3bd4"
    assert short_form("my-session") == "my-session"


def test_a_short_form_takes_precedence_over_other_endings() -> None:
    ids = ["01a226e43fe1-000003-3e93dd3bd4", "01a226e43fe2-000013-3e93dd3bd4", "chosen-by-me-1", "chosen-by-me-12"]
    assert named_by("3-3e93dd3bd4", ids) == [ids[0]]
    assert named_by("13-3e93dd3bd4", ids) == [ids[1]]
    assert named_by("3e93dd3bd4", ids) == ids[:2]
    assert named_by("chosen-by-me-1", ids) == ["chosen-by-me-1"]
    assert named_by("chosen-by", ids) == ids[2:]
    assert named_by("3bd4", ids) == [], "so short a part may be a typing error"


def test_long_ids_are_cut_where_they_differ() -> None:
    ids = ["a" * 30 + "1", "a" * 30 + "2", "front-1" + "b" * 30, "front-2" + "b" * 30, "short", "x" * WHOLE]
    shown = ShortIds(ids)
    assert [shown[i] for i in ids] == [
        "…aaaaaaaaaaaaa1", "…aaaaaaaaaaaaa2", "front-1bbbbbbb…", "front-2bbbbbbb…", "short", "x" * WHOLE,
    ]  # fmt: skip
    assert [ShortIds(ids, whole=True)[i] for i in ids] == ids
    twins = [f"{'c' * 20}{n}{'d' * 20}" for n in range(3)]
    assert len({ShortIds(twins)[i] for i in twins}) == 3


def test_a_cell_holds_no_control_codes() -> None:
    assert cell("a\x1b[31mb\nc\x07").plain == "a [31mb c "


# -- the commands, on a terminal and off it


def test_on_a_terminal_of_80_columns_no_line_is_wider(standing: Deployment, producer: Client) -> None:
    handles = [producer.submit("x " * 500, session=name, max_tokens=50_000) for name in (*LONG, None)]
    letter: Any = {
        "id": handles[-1].id,
        "error_code": "engine_error",
        "error": "it died " * 30,
        "json": '{"prompt":"a"}',
    }
    entry = producer.redis.xadd(producer.keys.dead, letter)
    try:
        eventually(lambda: all(h.record().state is RequestState.RUNNING for h in handles))
        commands = [["ps"], ["engines"], ["sessions"], ["call", handles[0].id], ["stats"], ["doctor"]]
        commands += [["dead", "ls"], ["dead", "show", handles[-1].id], ["ps", "-o", "table"]]
        for command in commands:
            shown = typed([RSM, *command], standing.env).splitlines()
            assert max(map(len, shown)) <= 80, "\n".join(shown)
            wrapped = [line for line in shown if line.strip() in (handles[-1].id[:8], handles[-1].id[8:])]
            assert wrapped == []
        assert short_form(handles[-1].id) in typed([RSM, "ps"], standing.env)
        wide = typed([RSM, "ps", "-o", "wide"], standing.env)
        assert {h.id for h in handles} <= set(wide.split())
        assert LONG[0] in wide
        assert wide.splitlines() == [line.rstrip() for line in wide.splitlines()]
    finally:
        producer.redis.xdel(producer.keys.dead, entry)
        for handle in handles:
            handle.cancel()


def test_off_a_terminal_lists_are_for_scripts(standing: Deployment, producer: Client) -> None:
    handle = producer.submit("x", session=LONG[0], max_tokens=50_000)
    try:
        eventually(lambda: handle.record().state is RequestState.RUNNING)
        (row,) = [line.split() for line in standing.rsm("ps").splitlines() if handle.id in line]
        assert row[:2] == [handle.id, LONG[0]]
        (row,) = [line.split() for line in standing.rsm("ps", "-o", "table").splitlines() if "RUNNING" in line]
        assert row[0] == short_form(handle.id)
        assert standing.json("ps")[0].keys() == json.loads(standing.rsm("ps", "-o", "json"))[0].keys()
        assert "contradict each other" in standing.rsm("ps", "--json", "-o", "wide", status=2)
        programs = [s["program"] for s in standing.json("sessions") if s["active"]]
        assert standing.json("sessions")[0]["program"] in programs
    finally:
        handle.cancel()
