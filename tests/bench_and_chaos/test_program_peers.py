"""Programs through a server and through the broker in front of it: their order, their cache hits, their figures."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryFile
from time import perf_counter

import pytest

from bench.http_servers import MODEL, HttpServer
from bench.programs.live.replay import Answer, Player
from bench.programs.live.samples import ENGINES, HIGH, KV_TOKENS, TIMES, WORKLOADS, sample, work_s
from bench.programs.metrics import Figures, ProgramRun
from bench.programs.peers import page as peer_page
from bench.programs.peers import run as peer_run
from bench.programs.peers.run import VOCABULARY, Cost, Run
from bench.programs.peers.systems import SYSTEMS, Running, Stage, ours_before_servers, over_http, settings, text_of
from bench.report.page import publish
from bench.venvs import peer_names
from rsm.broker import Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.simulation.workload.programs import CallSpec, ProgramSpec, Segment
from rsm.workers.backends.sim.text import tokenize
from tests.support.sim_http import SimHttp, sim_server

BLOCK = 16
HEAD, ANSWER = Segment(1, 3 * BLOCK), Segment(11, BLOCK)
# A fork and a join: 0 -> (1, 2) -> 3. The prompts of 1 and 3 contain earlier answers.
FORK = ProgramSpec(
    "fork",
    "test",
    0.0,
    (
        CallSpec((HEAD,), BLOCK, answer=11),
        CallSpec((HEAD, ANSWER, Segment(2, 5)), 7, answer=12, after=(0,), delay_s=0.05),
        CallSpec((Segment(3, 40),), 9, after=(0,)),
        CallSpec((HEAD, ANSWER, Segment(2, 5), Segment(12, 7), Segment(4, 3)), 4, after=(1, 2)),
    ),
)


@pytest.fixture(scope="module")
def engine() -> Iterator[SimHttp]:
    with sim_server("step_s=0.002", model=MODEL) as server:
        yield server


@dataclass(frozen=True)
class Call:
    """One call as seen by its producer."""

    prompt: int
    began: float
    ended: float
    cached: int


async def test_a_program_is_played_in_order_and_finds_its_cache(engine: SimHttp) -> None:
    calls: dict[int, Call] = {}  # by the size of the prompt
    async with over_http(engine.url) as serve:

        async def listening(program: str, prompt: list[int], tokens: int) -> Answer:
            began = perf_counter()
            answer = await serve(program, prompt, tokens)
            calls[len(prompt)] = Call(len(prompt), began, perf_counter(), answer.cached)
            assert len(answer.ids) == tokens
            return answer

        (times,) = await Player(listening, VOCABULARY).play([FORK])
    first, left, right, last = (calls[call.prompt_tokens] for call in FORK.calls)
    assert first.ended + 0.05 <= left.began
    assert first.ended <= right.began < left.began
    assert max(left.ended, right.ended) <= last.began
    # An answer's last token is not cached, so neither is the block that holds it.
    assert [c.cached for c in (first, left, right, last)] == [0, 3 * BLOCK, 0, 4 * BLOCK]
    run = ProgramRun.of(times, TIMES, 0.0)
    assert run.prompt_tokens == sum(c.prompt_tokens for c in FORK.calls)
    assert run.cached_tokens == 7 * BLOCK
    assert run.response_s == pytest.approx(last.ended - first.began, abs=0.05)


def test_a_text_has_its_tokens() -> None:
    ids = [*VOCABULARY[:50], *VOCABULARY[-50:]]
    assert tokenize(text_of(ids)) == ids


async def test_programs_run_through_the_broker_in_front_of_a_server(engine: SimHttp, server: EmbeddedRedis) -> None:
    programs = [replace(FORK, id=f"fork-{n}", arrival_s=n * 0.05) for n in range(3)]
    with TemporaryFile() as log:
        stage = Stage(server.url, [HttpServer(engine.url, engine.process)], log, "session_hash")  # type: ignore[arg-type]
        async with ours_before_servers(stage) as running:
            run = await peer_run.play(running, [engine.process.pid], programs)
            assert len(running.pids) == 2
            assert await peer_run.round_trip_ms(running.serve, 1) > 0
    assert (run.failed, run.figures.unfinished, run.figures.programs) == (0, 0, 3)
    # The second and third find everything but their own last block; see above.
    assert run.figures.hit_rate > 0.5
    assert min(run.cost.producer, run.cost.between, run.cost.servers) > 0
    assert run.cost.machine >= run.cost.producer


async def test_a_failed_call_fails_only_its_program() -> None:
    async def serve(program: str, prompt: list[int], tokens: int) -> Answer:
        await asyncio.sleep(0)
        if program == "bad" and len(prompt) == FORK.calls[2].prompt_tokens:
            raise RuntimeError("status 503")
        return Answer([VOCABULARY[0]] * tokens, 0, 0.0)

    programs = [replace(FORK, id=name) for name in ("bad", "good")]
    run = await peer_run.play(Running(serve, []), [], programs)
    assert (run.failed, run.figures.unfinished, run.figures.programs) == (1, 1, 2)


@pytest.mark.parametrize("workload", [*WORKLOADS, peer_page.ALL])
def test_samples_have_the_requested_load_and_fit_into_an_engine(workload: str) -> None:
    programs = sample(workload, HIGH, 4.0, seed=0, run=1)
    work = [work_s(p) for p in programs]
    assert HIGH * ENGINES * 4.0 <= sum(work) < HIGH * ENGINES * 4.0 + max(work)
    assert all(0 <= p.arrival_s <= 4.0 for p in programs)
    assert max(c.prompt_tokens + c.output_tokens for p in programs for c in p.calls) < KV_TOKENS
    assert fmean(len(p.calls) for p in programs) > 2


def test_two_runs_have_the_same_programs_with_other_texts() -> None:
    one, two = (sample("mixed", HIGH, 4.0, seed=0, run=run) for run in (1, 2))
    assert [[c.output_tokens for c in p.calls] for p in one] == [[c.output_tokens for c in p.calls] for p in two]
    texts = [{s.text for p in programs for c in p.calls for s in c.prompt} for programs in (one, two)]
    assert texts[0].isdisjoint(texts[1])
    assert {p.id for p in one}.isdisjoint(p.id for p in two)


def test_each_peer_has_its_environment() -> None:
    assert {s.venv for s in SYSTEMS} - {""} <= set(peer_names())
    assert len({s.label for s in SYSTEMS}) == len(SYSTEMS)


def found(monkeypatch: pytest.MonkeyPatch) -> peer_page.Found:
    """Returns results in which the systems take 1, 2, 3 … s on average; calls of the first peer have failed."""
    monkeypatch.setattr("bench.programs.peers.systems.version_of", lambda package, venv: "1.0")
    made = peer_page.Found(rounds=2, window_s=4.0, direct_ms=[5.0, 7.0], chains=[3.0, 3.0])
    for n, system in enumerate(SYSTEMS):
        made.round_trips_ms[system.label] = [7.0 + n, 9.0 + n]
        for workload in (*WORKLOADS, peer_page.ALL):
            for step in (0.0, 1.0):
                spec = replace(FORK, id=f"{n}")
                one = ProgramRun(spec.id, "test", 0.0, 1.0 + n + step, 0.0, 1.0, 36, 100, 60, 0.0, 0.0, 1.0)
                failed = n == 2
                made.add(workload, system.label, Run(Figures.of([one]), failed, 1.0, Cost(0.1, 0.2, 0.3, 0.8, 0.002)))
    return made


def page_of(made: peer_page.Found) -> str:
    return peer_page.report({"Machine": "m", "CPU": "c"}, SYSTEMS, made).page()


def test_the_page_compares_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    text = page_of(found(monkeypatch))
    assert "| **rsm-engine, in front of the same servers** | 1.50 / 1.50 |" in text
    assert "| vllm-router 1.0, consistent_hash | 2 calls failed |" in text
    assert "| **rsm-engine, with its own engines** | 2.50 / 2.50 | 69.4 | 3.0 |" in text
    best = SYSTEMS[3].label
    first, last = f"| rsm-engine, in front of the same servers | mean | 3.00 ({best})", "| > 1 everywhere | yes |"
    assert any(line.startswith(first) and line.endswith(last) for line in text.splitlines())
    assert "## The machine" in text


@pytest.mark.parametrize("figure", ["jct_mean", "jct_p95"])
def test_one_slower_workload_misses_the_target(monkeypatch: pytest.MonkeyPatch, figure: str) -> None:
    made = found(monkeypatch)
    peer = SYSTEMS[4].label
    for run in made.runs["react", peer]:
        object.__setattr__(run.figures, figure, 0.3)
    rows = [line for line in page_of(made).splitlines() if "> 1 everywhere" in line]
    slower = [f"0.20 ({peer})" in line or f"0.12 ({peer})" in line for line in rows]
    assert slower == [line.endswith("| **no** |") for line in rows]
    assert sum(slower) == 2


def test_at_low_load_a_program_may_be_slower_by_its_hops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two systems are ours, with hops of 2 and 3 ms and three sequential calls; a peer is `later` faster."""
    for later, verdicts in ((0.005, ["yes", "yes"]), (0.0075, ["**no**", "yes"]), (0.02, ["**no**", "**no**"])):
        made = found(monkeypatch)
        for ours in SYSTEMS[:2]:
            for run in made.runs[peer_page.ALL, ours.label]:
                object.__setattr__(run.figures, "jct_mean", 1.0)
        for run in made.runs[peer_page.ALL, SYSTEMS[3].label]:
            object.__setattr__(run.figures, "jct_mean", 1.0 - later)
        rows = [line for line in page_of(made).splitlines() if "one hop for each of 3.0 sequential calls" in line]
        assert [line.split(" | ")[-1].removesuffix(" |") for line in rows] == verdicts


def test_sequential_calls_are_counted_along_the_longest_chain() -> None:
    alone = replace(FORK, calls=FORK.calls[:1])
    assert peer_page.chain([FORK]) == 3
    assert peer_page.chain([FORK, alone]) == 2


def test_ours_has_the_settings_for_programs(server: EmbeddedRedis) -> None:
    with TemporaryFile() as log:
        made = settings(Stage(server.url, [], log, "cost"))
    assert (made.policy, made.service_rule) == ("cost", "total")
    assert made.level_bounds[0] < Settings().level_bounds[0]


def test_the_section_replaces_the_one_in_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scheduling.md"
    path.write_text("before\n<!-- program-peers -->\nold\n<!-- /program-peers -->\nafter\n")
    report = peer_page.report({"Machine": "m", "CPU": "c"}, SYSTEMS, found(monkeypatch))
    publish(report, "program_peers", tmp_path, path)
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "69.4" in text
    assert "## The machine" not in text
    publish(report, "program_peers", tmp_path, path)
    assert path.read_text() == text
    publish(report, "program_peers", tmp_path, tmp_path / "none.md")
    assert not (tmp_path / "none.md").exists()
