"""Pages of results: where they are written, and the real-time benchmarks' pages for known figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.programs import routing_cost
from bench.programs.live import small
from bench.programs.routing_cost import Placing
from bench.programs.systems import FCFS_RR, OURS
from bench.report.page import Report, into_docs, publish
from bench.vllm import cpu, scheduler_share
from rsm.broker import Settings
from rsm.broker.connection.embedded import EmbeddedRedis

ABOUT = {"Machine": "m", "CPU": "c"}


def verdicts(lines: list[str]) -> list[str]:
    return [line.split(" | ")[-1].removesuffix(" |") for line in lines if line.endswith(("| yes |", "| **no** |"))]


def test_a_report_is_written_into_results_and_docs(tmp_path: Path) -> None:
    docs = tmp_path / "docs.md"
    docs.write_text("a\n<!-- some-name -->\nold\n<!-- /some-name -->\nz\n")
    publish(Report("Title", ABOUT, ["the table"], {"x": 1}, "make it", ["the rest"]), "some_name", tmp_path, docs)
    page = (tmp_path / "some_name.md").read_text()
    assert page == "# Title: m\n\n- CPU: c\n\nthe table\n\nthe rest\n\nMade by `make it`.\n"
    assert json.loads((tmp_path / "some_name.json").read_text()) == {"machine": ABOUT, "x": 1}
    assert docs.read_text() == "a\n<!-- some-name -->\n\nthe table\n\n<!-- /some-name -->\nz\n"


@pytest.mark.parametrize("text", ["", "no marks", "<!-- x --> alone", "<!-- /x --> <!-- x -->"])
def test_docs_without_the_marks_are_unchanged(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    docs = tmp_path / "docs.md"
    docs.write_text(text)
    assert not into_docs("x", ["the table"], docs)
    assert docs.read_text() == text
    assert "<!-- x -->" in capsys.readouterr().out


# -- short calls on a full engine

PHASE = {
    "preempted": 3,
    "decode": {"ms": 2.0},
    "long_ended_s": [5.0, 6.0, 7.0, 8.0],
    "short_came_s": [1.0, 4.0, 5.5, 6.5],
    "short_first_ms": [10.0, 30.0, 50.0, 1.0],
    "short_ms": [110.0, 130.0, 150.0, 101.0],
}


def test_short_calls_count_only_while_long_ones_wait_for_slots() -> None:
    """Two of the four long calls run at a time, so none waits from 6 s on."""
    assert cpu.figures(PHASE, 2)["shorts"] == 3
    found = cpu.figures(PHASE, 3)
    assert (found["shorts"], found["first_ms"], found["end_ms"], found["end_worst_ms"]) == (2, 20, 120, 130)
    with pytest.raises(ValueError, match="while all slots"):
        cpu.figures(PHASE, 4)


@pytest.mark.parametrize(
    ("first", "differ", "met"),
    [
        (10.0, 0, ["yes", "**no**", "yes"]),
        (11.0, 0, ["**no**", "**no**", "yes"]),
        (10.0, 1, ["yes", "**no**", "**no**"]),
    ],
)
def test_a_short_call_must_be_three_times_faster_with_the_same_tokens(
    first: float, differ: int, met: list[str]
) -> None:
    base = cpu.figures(PHASE, 2) | {"compared": 9, "differ": 0}
    ours = {**base, "first_ms": first, "differ": differ}
    engine = {"vllm": "1.0", "device": "cpu", "slots": 2}
    lines = cpu.section({"priority": [base], "fcfs": [base], "plas": [ours]}, engine)
    assert verdicts(lines) == met
    assert f"{9 - differ} of 9 calls" in "\n".join(lines)


def test_tokens_of_two_runs_are_compared(tmp_path: Path) -> None:
    for name, tokens in (("a", {"x": [1, 2], "y": [3], "z": [4]}), ("b", {"x": [1, 2], "y": [5]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.json").write_text(json.dumps(tokens))
    assert cpu.compare(tmp_path / "a", tmp_path / "b") == {"compared": 2, "differ": 1}
    assert cpu.compare(tmp_path / "a", tmp_path / "a") == {"compared": 3, "differ": 0}


# -- the scheduler's share of a step

GPU = {"device": "H", "vllm": "1.0", "model": "m"}


def share_row(**changes: float) -> dict[str, Any]:
    times = {"stock_ms": 2.0, "plas_ms": 2.1, "own_ms": 0.01, "own_mean_ms": 0.05, "own_p99_ms": 0.5}
    return {"load": "quiet", "mode": "sync", "running": 256, "steps": 40, **times, **changes}


def test_decode_steps_are_found_by_their_calls() -> None:
    kinds = [
        {"phase": "decode 256 x 64", "prefill": False, "ms": 10.0},
        {"phase": "decode 256 x 64", "prefill": True, "ms": 99.0},
        {"phase": "decode 25 x 64", "prefill": False, "ms": 5.0},
        {"phase": "decode 256 x 1024", "prefill": False, "ms": 20.0},
    ]
    assert scheduler_share.decode_ms({"kinds": kinds}, 256) == {"64": 10.0, "1024": 20.0}
    measured = json.loads(scheduler_share._STEPS.read_text())
    assert set(scheduler_share.decode_ms(measured, 256)) == {"64", "1024"}


@pytest.mark.parametrize(
    ("changes", "met"), [({}, "yes"), ({"plas_ms": 2.21}, "**no**"), ({"own_mean_ms": 0.21}, "**no**")]
)
def test_the_plug_in_is_compared_with_the_shortest_step(changes: dict[str, float], met: str) -> None:
    rows = [share_row(), share_row(**changes)]
    assert verdicts(scheduler_share.section(rows, {"64": 10.0, "1024": 20.0}, GPU)) == [met]


# -- the cost of choosing an engine


def test_times_of_calls_are_reported_in_total_and_for_the_choice() -> None:
    placings = [Placing(0.001 * n, 0.0001 * n, n > 90) for n in range(101)]
    found = routing_cost.figures("alone", placings)
    assert (found["alone_all_p50_ms"], found["alone_all_p99_ms"]) == pytest.approx((50, 99))
    assert found["alone_choice_p99_ms"] == pytest.approx(9.9)
    assert (found["alone_looked"], found["alone_looked_p50_ms"]) == pytest.approx((10 / 101, 95.5))


@pytest.mark.parametrize("policy", routing_cost.POLICIES)
def test_calls_are_placed_on_a_fleet_with_a_history(server: EmbeddedRedis, policy: str) -> None:
    """A call takes at most one refresh and one assignment in addition to reading the stream, and so does a batch."""
    run = routing_cost.measure(server.url, policy, engines=4, calls=20, batches=2)
    assert 0 < run["alone_choice_p50_ms"] < run["alone_all_p50_ms"]
    assert 2 / run["batch"] <= run["trips_a_call"] <= 3 / run["batch"]
    fast = {**run, "alone_all_p99_ms": 0.99, "alone_choice_p99_ms": 0.1}
    slow = {**fast, "alone_all_p99_ms": 1.0}
    lines = routing_cost.section({(policy, 4): [slow], (policy, 64): [fast]})
    assert verdicts(lines) == ["yes", "**no**", "yes", "yes"]


# -- the small case


def test_a_system_of_the_small_case_has_its_settings() -> None:
    base, ours = (small.stack(s, 2, "sim") for s in (FCFS_RR, OURS))
    assert [e.engine_id for e in base.engines] == ["e0", "e1"]
    fcfs, plas = (Settings(**stack.settings) for stack in (base, ours))
    assert (fcfs.policy, fcfs.engine_scheduler, fcfs.level_bounds) == ("round_robin", "fcfs", ())
    assert (plas.policy, plas.engine_scheduler, plas.service_rule) == ("cost", "plas", "total")
    assert plas.level_bounds[0] < Settings().level_bounds[0]


def test_programs_of_the_small_case_fit_into_the_model() -> None:
    programs = small.programs(small._LOAD, 3.0, seed=0, texts=1)
    assert len({p.kind for p in programs}) == 3
    assert max(small._longest(p) for p in programs) < small._LONGEST


def test_ours_must_not_be_slower_than_any_other() -> None:
    run: dict[str, Any] = {key: 1.0 for _, key, *_ in small._COLUMNS} | {"programs": 3, "calls": 9}
    better, worse = {**run, "per_token_mean": 0.9, "per_token_p95": 0.9}, {**run, "per_token_mean": 0.8}
    lines = small.section({"fcfs_rr": [run], "paper": [worse], "ours": [better]}, 2, "sim")
    assert verdicts(lines) == ["yes", "yes", "**no**", "yes"]
    assert ": 3 programs (9 calls)." in lines[0]
