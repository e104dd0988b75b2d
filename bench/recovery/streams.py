"""Streams under the death of an engine: 18 run on three engines, one of which is killed with `kill -9`.

    python -m bench.recovery.streams [--rounds 3] [--name streams]

The same prompts and the same engine parameters for all systems; the busiest engine is the one that dies.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from bench.http_servers import PATIENCE_S
from bench.recovery.stream_account import Account, Heard, Total
from bench.recovery.stream_systems import ENGINES, SYSTEMS, TOKEN_S, Ask, Setup, System
from bench.report.machine import machine, server_name
from bench.report.page import write
from bench.report.table import table_line
from rsm.broker import Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect
from rsm.workers.backends.sim.text import Prompt, answer

STREAMS, SESSIONS = 18, 6
TOKENS = 600
# The engine dies when every client has heard so many tokens.
KILL_AFTER_TOKENS = 30
# On a machine that is too busy some streams are over before the last one has begun: such a run shows nothing.
TRIES = 3
_SHARED = "something that all calls of this session begin with, " * 8


def asks() -> list[Ask]:
    """The calls: those of one session begin alike."""
    sessions = [f"session-{n % SESSIONS}" for n in range(STREAMS)]
    return [Ask(s, f"{s}: {_SHARED} question {n}?", TOKENS) for n, s in enumerate(sessions)]


def expected(ask: Ask) -> str:
    """What an undisturbed engine says."""
    return answer(Prompt(ask.prompt).seed(), ask.max_tokens).text


async def listen(setup: Setup, ask: Ask, heard: Heard) -> None:
    """One client."""
    try:
        async for text in setup.stream(ask):
            heard.take(text, time.monotonic())
        heard.ended = True
    except Exception as e:
        heard.error = f"{type(e).__name__}: {e}"


class TooLate(Exception):
    """Streams had ended before the kill."""


def valid_run(system: System, url: str) -> Total:
    """A run in which all streams ran when the engine was killed; RuntimeError if there is none in TRIES."""
    for _ in range(TRIES):
        try:
            return asyncio.run(one_run(system, url))
        except TooLate as e:
            print(f"  {e}: once more", flush=True)
    raise RuntimeError(f"{system.name}: the machine is too busy for this benchmark")


async def one_run(system: System, url: str) -> Total:
    with tempfile.TemporaryFile() as log:
        async with system.run(url, log) as setup:
            calls = asks()
            heard = [Heard() for _ in calls]
            clients = [asyncio.create_task(listen(setup, a, h)) for a, h in zip(calls, heard, strict=True)]
            async with asyncio.timeout(PATIENCE_S):
                while any(len(h.words) < KILL_AFTER_TOKENS for h in heard):
                    if all(c.done() for c in clients):
                        raise RuntimeError(f"{system.name}: no stream began: {heard[0].error}")
                    await asyncio.sleep(TOKEN_S)
            running = await asyncio.to_thread(setup.running)
            if sum(running.values()) < STREAMS:
                raise TooLate(f"{system.name}: only {sum(running.values())} of {STREAMS} streams ran at the kill")
            victim = max(running, key=lambda engine: running[engine])
            killed = time.monotonic()
            setup.kill(victim)
            await asyncio.wait(clients, timeout=PATIENCE_S)
            accounts = [Account.of(expected(a), h) for a, h in zip(calls, heard, strict=True)]
            gap = max(h.longest_gap_s(killed) for h in heard)
            return Total.of(accounts, running[victim], gap)


def page(about: Mapping[str, str], runs: Mapping[int, Sequence[Total]]) -> str:
    lines = [f"# Streams when an engine is killed: {about['Machine']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "Machine"]
    lines += [
        "",
        f"{STREAMS} streams of {TOKENS} tokens, in {SESSIONS} sessions, run on {ENGINES} modelled engines "
        f"(a token each {TOKEN_S * 1000:g} ms). When every client has heard {KILL_AFTER_TOKENS} tokens, "
        "the busiest engine gets `kill -9`. Cut: the client saw an error or an early end. "
        "Tokens are held against the text of an undisturbed engine. "
        "Sums over the runs; the gap is the longest silence in a stream that went on.",
        "",
    ]
    head = ("System", "Version", "Engines", "Runs", "Streams", "On the killed engine", "Cut", "Tokens lost", "Repeated",
            "Gap, s")  # fmt: skip
    lines += [table_line(head), table_line(["---"] * 3 + ["---:"] * 7)]
    for number, totals in runs.items():
        system, t = SYSTEMS[number], Total.sum(totals)
        counts = (len(totals), t.streams, t.on_killed, t.cut, t.lost, t.repeated)
        cells = (system.name, system.version(), system.engines, *map(str, counts), f"{t.longest_gap_s:.2f}")
        lines.append(table_line(cells))
    return "\n".join([*lines, "", "Made by `make bench-crash`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="streams", help="of the result files in bench/results")
    args = parser.parse_args()
    runs: dict[int, list[Total]] = {}
    with EmbeddedRedis() as embedded:
        server = connect(Settings().with_redis(embedded.url))
        about = machine(f"{os.cpu_count()} cores, shared with others", server_name(server.info("server")))
        for i in range(args.rounds):
            print(f"round {i + 1} of {args.rounds}", flush=True)
            for number, system in enumerate(SYSTEMS):
                total = valid_run(system, embedded.url)
                print(f"  {system.name} ({system.engines}): {total}", flush=True)
                runs.setdefault(number, []).append(total)
                server.flushall()
        server.close()
    data = [
        {"name": s.name, "version": s.version(), "engines": s.engines, "runs": [asdict(t) for t in runs[n]]}
        for n, s in enumerate(SYSTEMS)
    ]
    write(args.name, page(about, runs), {"machine": about, "systems": data})


if __name__ == "__main__":
    main()
