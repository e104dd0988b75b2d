"""The acts of `rsm demo`. Each one does something, shows the results and checks them."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

from rsm.broker import CallHandle, CallRecord, Delta, RequestState
from rsm.cli.demo.live import LiveStreams
from rsm.cli.demo.stage import TIMEOUT_S, Stage
from rsm.cli.output import counted, seconds, table

# Token ids that are words to both the tiny model and the simulator.
_FIRST_WORD, _WORDS = 300, 250
_AGENT_STEPS = 3
_LONG_CALLS = 6
_LONG_TOKENS = 6000
_CROWD = 16
# A call counts as running once it has published this many chunks.
_UNDER_WAY = 8
# The longest that a cancelled call may take to end. On a machine that is not overloaded, it takes milliseconds.
_CANCEL_LIMIT_S = 5.0


def stream_one(stage: Stage) -> float:
    """Act 1. Returns the speed of one call alone, in tokens per second."""
    stage.act("1. A streamed call", "Each chunk goes from the engine through Redis to this terminal at once.")
    began = time.monotonic()
    handle = stage.submit("Explain quantum computing to a curious child.", "reader", 64, stream=True)
    numbers, text, first = [], "", 0.0
    for delta in handle.stream():
        first = first or time.monotonic()
        numbers.append(delta.n)
        text += delta.text
        stage.out.file.write(delta.text)
        stage.out.file.flush()
    stage.out.file.write("\n")
    result = handle.result(TIMEOUT_S)
    took = time.monotonic() - first
    pace = result.completion_tokens / took
    stage.out.print(
        f"{len(numbers)} chunks, {result.completion_tokens} tokens on {result.engine_id}; first chunk after "
        f"{seconds((first - began) * 1000)}, then {pace:.0f} tokens/s"
    )
    stage.check(numbers == list(range(len(numbers))), "the chunks are numbered without gaps and repeats")
    stage.check(text == result.text, "the chunks add up to the text of the result")
    return pace


def follow_an_agent(stage: Stage) -> None:
    """Act 2."""
    threshold = stage.monitor.settings.cache_token_threshold
    stage.act(
        "2. A program of three steps stays where its KV cache is",
        f"Each prompt has more than {threshold} tokens and contains the previous step. Look at ENGINE, CACHED and WHY.",
    )
    ids = _words(0, threshold + 400)
    records: list[CallRecord] = []
    for step in range(_AGENT_STEPS):
        handle = stage.submit(ids, "agent", 32)
        handle.wait(TIMEOUT_S)
        record = handle.record()  # the event of the end does not say why the engine was chosen
        records.append(record)
        ids = ids + (record.result.token_ids if record.result else []) + _words(step + 1, 150)
    stage.show(table("", ["STEP", "ENGINE", "PROMPT", "CACHED", "FIRST TOKEN", "WHY"], _agent_rows(records)))
    results = [r.result for r in records if r.result is not None]
    stage.check(len(results) == _AGENT_STEPS, "all steps completed")
    stage.check(len({r.engine_id for r in records}) == 1, f"all steps ran on {records[0].engine_id}")
    # The engine caches whole blocks, and always computes at least the last token.
    cached = all(b.cached_tokens > a.prompt_tokens * 0.9 for a, b in pairwise(results))
    stage.check(cached, "from the second step on, the previous step was found in the KV cache")


def _agent_rows(records: Sequence[CallRecord]) -> list[list[object]]:
    rows: list[list[object]] = []
    for step, r in enumerate(records, 1):
        cached, ttft = (r.result.cached_tokens, r.result.ttft or 0.0) if r.result else (0, 0.0)
        rows.append([step, r.engine_id, r.prompt_tokens, cached, seconds(ttft * 1000), r.why])
    return rows


def cancel_a_session(stage: Stage) -> None:
    """Act 3."""
    stage.act(
        "3. One command cancels a running session on both engines",
        f"{_LONG_CALLS} calls of {_LONG_TOKENS} tokens each. Look at ENDED AFTER and TEXT KEPT.",
    )
    handles = [
        stage.submit(f"Write chapter {i} of a long novel.", "novel", _LONG_TOKENS, stream=True)
        for i in range(_LONG_CALLS)
    ]
    stage.until(lambda: all(stage.chunks(h) >= _UNDER_WAY for h in handles), "all long calls are running")
    began = time.monotonic()
    cancelled = stage.client.cancel_session("novel", "the reader left")
    ended: dict[str, float] = {}
    for handle in handles:
        handle.add_done_callback(lambda h: ended.update({h.id: time.monotonic() - began}))
    records = stage.records(handles)
    rows = [
        [
            i,
            r.engine_id,
            r.state.value,
            seconds(ended[r.request_id] * 1000),
            f"{r.result.completion_tokens} tokens, {len(r.result.text)} characters" if r.result else "none",
        ]
        for i, r in enumerate(records, 1)
    ]
    stage.show(table("", ["CALL", "ENGINE", "STATE", "ENDED AFTER", "TEXT KEPT"], rows))
    last_s = max(ended.values())
    stage.check(cancelled == _LONG_CALLS, f"one command reached {cancelled} of {_LONG_CALLS} calls")
    stage.check(all(r.state is RequestState.CANCELLED for r in records), "all of them are CANCELLED")
    stage.check({r.engine_id for r in records} == set(stage.engine_ids), "they were running on both engines")
    stage.check(all(r.result and r.result.text for r in records), "each one keeps its partial text")
    stage.check(last_s < _CANCEL_LIMIT_S, f"the last one ended after {seconds(last_s * 1000)}")


@dataclass
class Crowd:
    """Calls that the death of an engine interrupts."""

    handles: list[CallHandle]
    expected: list[str] = field(repr=False)
    before: list[CallRecord] = field(default_factory=list)
    after: list[CallRecord] = field(default_factory=list)
    streams: list[list[Delta]] = field(default_factory=list)
    victim: str = ""
    killed_ms: int = 0


def kill_an_engine(stage: Stage, pace: float) -> None:
    """Act 4."""
    stage.act(
        "4. kill -9 for an engine with running calls",
        f"{_CROWD} streamed greedy calls. The same prompts first run undisturbed, for comparison. "
        "Look at ENDED ON, ATTEMPTS and SAME TEXT.",
    )
    prompts = [f"Agent {i} reports on what it has seen today." for i in range(_CROWD)]
    # Some seconds long, so that all of them are running when the engine is killed.
    tokens = int(min(800, max(120, 3 * pace)))
    undisturbed = stage.records([stage.submit(p, f"calm-{i}", tokens) for i, p in enumerate(prompts)])
    crowd = Crowd(
        [stage.submit(p, f"crowd-{i}", tokens, stream=True) for i, p in enumerate(prompts)],
        [r.result.text if r.result else "" for r in undisturbed],
    )
    live = LiveStreams(stage.out, stage.monitor, crowd.handles, tokens, stage.engine_ids)
    with live, ThreadPoolExecutor(_CROWD) as readers:
        reading = [readers.submit(live.read, handle) for handle in crowd.handles]
        stage.until(lambda: all(stage.chunks(h) >= _UNDER_WAY for h in crowd.handles), "all calls are running")
        _choose_victim(crowd)
        for record in crowd.before:
            live.seen(record.request_id, record.engine_id)
        live.note(_kill(stage, crowd))
        crowd.streams = [future.result(TIMEOUT_S) for future in reading]
    crowd.after = stage.records(crowd.handles)
    _report_kill(stage, crowd)


def _choose_victim(crowd: Crowd) -> None:
    """The engine that runs more calls."""
    crowd.before = [handle.record() for handle in crowd.handles]
    busy = Counter(r.engine_id for r in crowd.before if r.state is RequestState.RUNNING)
    crowd.victim = busy.most_common(1)[0][0]


def _kill(stage: Stage, crowd: Crowd) -> str:
    """Kills the engine. Returns a line that says so."""
    running = sum(r.engine_id == crowd.victim and r.state is RequestState.RUNNING for r in crowd.before)
    pid = stage.monitor.engine(crowd.victim)["pid"]
    crowd.killed_ms = stage.monitor.now_ms()
    os.kill(pid, signal.SIGKILL)
    line = f"kill -9 {pid}: {crowd.victim} died with {counted(running, 'running call')}"
    if not stage.out.is_terminal:  # else the live view shows it
        stage.out.print(line)
    return line


def _report_kill(stage: Stage, crowd: Crowd) -> None:
    outcomes = list(zip(crowd.before, crowd.after, crowd.streams, crowd.expected, strict=True))
    rows = [
        [i, b.engine_id, a.engine_id, a.attempt, len(chunks), _yes(_gapless(chunks)), _yes(_text(chunks) == text)]
        for i, (b, a, chunks, text) in enumerate(outcomes, 1)
    ]
    columns = ["CALL", "RAN ON", "ENDED ON", "ATTEMPTS", "CHUNKS", "NO GAPS", "SAME TEXT"]
    stage.show(table("", columns, rows))
    hit = [a for b, a, _, _ in outcomes if b.engine_id == crowd.victim and b.state is RequestState.RUNNING]
    pauses = [a.started_ms - crowd.killed_ms for a in hit if a.started_ms is not None]
    engines = ", ".join(sorted({a.engine_id for a in hit}))
    stage.out.print(
        f"{counted(len(hit), 'call')} resumed on {engines}, the last one {seconds(max(pauses))} after the kill"
    )
    stage.check(all(a.state is RequestState.COMPLETED for a in crowd.after), f"all {_CROWD} calls completed")
    stage.check(bool(hit) and all(a.attempt > 1 for a in hit), "each call of the dead engine took a second attempt")
    stage.check(all(_gapless(s) for s in crowd.streams), "the chunks of every stream have no gaps and no repeats")
    same = all(_text(chunks) == text for _, _, chunks, text in outcomes)
    whole = all(a.result is not None and _text(chunks) == a.result.text for _, a, chunks, _ in outcomes)
    stage.check(whole, "every stream has the text of its result")
    if stage.exact:
        stage.check(same, "every stream has the text of its undisturbed run")
    elif not same:
        stage.out.print(
            "On a GPU, rounding depends on the size of the batch, so a text may differ from its undisturbed run."
        )


def _gapless(chunks: Sequence[Delta]) -> bool:
    return [d.n for d in chunks] == list(range(len(chunks)))


def _text(chunks: Sequence[Delta]) -> str:
    return "".join(d.text for d in chunks)


def _yes(fact: bool) -> str:
    return "yes" if fact else "NO"


def count_all_calls(stage: Stage) -> None:
    """Act 5."""
    stage.act("5. No call is lost", "The counters in Redis, and the calls that this demo has submitted.")
    stage.until(lambda: not _busy(stage), "no call is waiting or running")
    stats, own = stage.monitor.stats(), stage.states_of_ledger()
    states = [s.value for s in RequestState]
    rows = [[state, stats[state.lower()], own[state]] for state in states]
    stage.show(table("", ["CALLS", "IN REDIS", "SUBMITTED"], [*rows, ["all", stats["submitted"], len(stage.ledger)]]))
    lost = len(stage.ledger) - sum(own[s.value] for s in RequestState if s.terminal)
    stage.check(all(stats[s.lower()] == own[s] for s in states), "both agree")
    stage.check(lost == 0 and stats["unaccounted"] == 0, f"calls lost: {lost + stats['unaccounted']}")


def _busy(stage: Stage) -> bool:
    stats = stage.monitor.stats()
    return bool(stats["pending"] or stats["running"] or stats["unaccounted"])


def _words(seed: int, count: int) -> list[int]:
    """Repeatable word ids that differ by `seed`."""
    return [_FIRST_WORD + (seed * 7919 + i * 31 + i * i % 97) % _WORDS for i in range(count)]
