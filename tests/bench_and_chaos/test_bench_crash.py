"""The parts of the crash benchmarks whose errors a table would not show. No peer is installed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench.recovery import __main__ as recovery
from bench.recovery import streams
from bench.recovery.__main__ import Ours, Peer
from bench.recovery.ours import SCENARIOS, measure
from bench.recovery.stream_account import Account, Received, Total
from bench.recovery.stream_systems import SYSTEMS, StreamCut, read_event
from bench.report.page import write
from bench.venvs import PEERS, peer_names
from rsm.broker.connection.embedded import EmbeddedRedis
from tests.support.sim_processes import said

TEXT = " w1 w2 w3 w4"


def received(text: str, ended: bool = True, step_s: float = 1.0) -> Received:
    made = Received(ended=ended)
    for n, word in enumerate(text.split()):
        made.take(word, n * step_s)
    return made


@pytest.mark.parametrize(
    ("text", "ended", "account"),
    [
        (TEXT, True, Account(cut=False, lost=0, repeated=0, in_order=True)),
        (" w1 w2", False, Account(cut=True, lost=2, repeated=0, in_order=True)),
        (" w1 w2 w2 w3 w4", True, Account(cut=False, lost=0, repeated=1, in_order=False)),
        (" w1 w3 w4", True, Account(cut=False, lost=1, repeated=0, in_order=False)),
        (" w1 w3 w2 w4", True, Account(cut=False, lost=0, repeated=0, in_order=False)),
        (" w1 w2 w9 w4", True, Account(cut=False, lost=1, repeated=1, in_order=False)),
        ("", False, Account(cut=True, lost=4, repeated=0, in_order=True)),
    ],
)
def test_tokens_are_accounted_for(text: str, ended: bool, account: Account) -> None:
    assert Account.of(TEXT, received(text, ended)) == account


def test_the_gap_is_that_after_the_kill() -> None:
    stream = Received()
    for at in (0.0, 5.0, 6.0, 8.5, 9.0):
        stream.take("w1", at)
    assert stream.longest_gap_s(since=0.0) == 5.0
    assert stream.longest_gap_s(since=6.0) == 2.5
    assert stream.longest_gap_s(since=20.0) == 0.0
    assert Received().longest_gap_s(0.0) == 0.0


def test_totals_add_up_and_keep_the_longest_gap() -> None:
    one = Total.of([Account.of(TEXT, received(TEXT)), Account.of(TEXT, received(" w1", ended=False))], 1, 0.5)
    assert one == Total(2, on_killed=1, cut=1, lost=3, repeated=0, disordered=0, longest_gap_s=0.5)
    assert Total.sum([one, one, Total(1, 0, 0, 0, 2, 1, 0.7)]) == Total(5, 2, 2, 6, 2, 1, 0.7)


def test_events_of_a_stream_of_completions() -> None:
    assert read_event('{"choices": [{"text": " w1", "finish_reason": null}]}') == (" w1", False)
    assert read_event('{"choices": [{"text": " w2", "finish_reason": "length"}]}') == (" w2", True)
    assert read_event('{"choices": [], "usage": {}}') == ("", False)
    assert read_event("[DONE]") == ("", True)
    with pytest.raises(StreamCut):
        read_event('{"error": {"message": "engine gone"}}')


def test_prompts_share_prefixes_only_within_a_session() -> None:
    calls = streams.asks()
    assert len({c.prompt for c in calls}) == streams.STREAMS
    assert len({c.session for c in calls}) == streams.SESSIONS
    assert all(c.prompt.startswith(c.session) for c in calls)
    assert streams.expected(calls[0]) == said(calls[0].prompt, streams.TOKENS)


def test_each_system_and_each_queue_has_its_environment() -> None:
    assert {s.venv for s in SYSTEMS} - {""} <= set(peer_names())
    assert set(recovery.QUEUES) <= set(peer_names())
    for queue in recovery.QUEUES:
        script = (PEERS / f"{queue}_recovery.py").read_text()
        assert all(f'"{profile}": ' in script for profile in recovery.PROFILES)


def test_the_page_reports_missed_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = [Peer("slow", "1", "default", [65.0, None]), Peer("quick", "2", "tuned", [9.0, 7.19])]
    ours = [
        Ours(s.name, busy, s.limit_s, [0.5, 0.4, 9.0 if busy else 0.6]) for s in SCENARIOS for busy in (False, True)
    ]
    text = recovery.page({"Machine": "m", "CPU": "c"}, peers, ours, 180)
    assert "| slow | 1 | default | 65.0 s, none within 180 s (1 of 2) |" in text
    assert "| quick | 2 | tuned | 7.2 s, 9.0 s |" in text
    assert "0.50 s (worst of 3: 0.60 s)" in text
    assert len(re.findall(r"\| busy \|.* \*\*no\*\* \|", text)) == len(SCENARIOS)
    assert len(re.findall(r"\| idle \|.* yes \|", text)) == len(SCENARIOS)
    write("r", text, {"peers": 2}, tmp_path)
    assert (tmp_path / "r.md").read_text() == text
    assert json.loads((tmp_path / "r.json").read_text()) == {"peers": 2}
    assert "none within" in capsys.readouterr().out


def test_a_scenario_measures_a_real_recovery(server: EmbeddedRedis) -> None:
    scenario = SCENARIOS[0]
    assert 0 <= measure(server.url, scenario, busy=False) < 10 * scenario.limit_s
