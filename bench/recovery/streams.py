"""Measures what happens to streams when their engine dies: 18 streams on three engines, one killed with `kill -9`.

    python -m bench.recovery.streams [--rounds 3] [--name streams]

All systems get the same prompts and the same engine parameters. The busiest engine is the one that is killed.
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
from bench.recovery.stream_account import Account, Received, Total
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
# The engine is killed when every client has received this many tokens.
KILL_AFTER_TOKENS = 30
# On a busy machine some streams may end before the last one begins; such a run is repeated.
TRIES = 3
_SHARED = "something that all calls of this session begin with, " * 8


def asks() -> list[Ask]:
    """Returns the calls; those of one session share a prefix."""
    sessions = [f"session-{n % SESSIONS}" for n in range(STREAMS)]
    return [Ask(s, f"{s}: {_SHARED} question {n}?", TOKENS) for n, s in enumerate(sessions)]


def expected(ask: Ask) -> str:
    """Returns the text of an undisturbed engine."""
    return answer(Prompt(ask.prompt).seed(), ask.max_tokens).text


async def listen(setup: Setup, ask: Ask, received: Received) -> None:
    """Runs one client."""
    try:
        async for text in setup.stream(ask):
            received.take(text, time.monotonic())
        received.ended = True
    except Exception as e:
        received.error = f"{type(e).__name__}: {e}"


class TooLate(Exception):
    """Some streams had ended before the kill."""


def valid_run(system: System, url: str) -> Total:
    """Returns a run in which all streams were running at the kill; RuntimeError if TRIES runs give none."""
    for _ in range(TRIES):
        try:
            return asyncio.run(one_run(system, url))
        except TooLate as e:
            print(f"  {e}; repeating the run", flush=True)
    raise RuntimeError(f"{system.name}: no valid run in {TRIES} tries. Repeat the benchmark on a less busy machine.")


async def one_run(system: System, url: str) -> Total:
    with tempfile.TemporaryFile() as log:
        async with system.run(url, log) as setup:
            calls = asks()
            received = [Received() for _ in calls]
            clients = [asyncio.create_task(listen(setup, a, r)) for a, r in zip(calls, received, strict=True)]
            async with asyncio.timeout(PATIENCE_S):
                while any(len(r.words) < KILL_AFTER_TOKENS for r in received):
                    if all(c.done() for c in clients):
                        raise RuntimeError(f"{system.name}: all streams ended before the kill: {received[0].error}")
                    await asyncio.sleep(TOKEN_S)
            running = await asyncio.to_thread(setup.running)
            if sum(running.values()) < STREAMS:
                raise TooLate(
                    f"{system.name}: only {sum(running.values())} of {STREAMS} streams were running at the kill"
                )
            victim = max(running, key=lambda engine: running[engine])
            killed = time.monotonic()
            setup.kill(victim)
            await asyncio.wait(clients, timeout=PATIENCE_S)
            accounts = [Account.of(expected(a), r) for a, r in zip(calls, received, strict=True)]
            gap = max(r.longest_gap_s(killed) for r in received)
            return Total.of(accounts, running[victim], gap)


def page(about: Mapping[str, str], runs: Mapping[int, Sequence[Total]]) -> str:
    lines = [f"# Streams when an engine is killed: {about['Machine']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "Machine"]
    lines += [
        "",
        f"{STREAMS} streams of {TOKENS} tokens, in {SESSIONS} sessions, run on {ENGINES} modelled engines "
        f"(one token every {TOKEN_S * 1000:g} ms). When every client has received {KILL_AFTER_TOKENS} tokens, "
        "the busiest engine is killed with `kill -9`. Cut: the client saw an error or an early end. "
        "Tokens are compared with the text of an undisturbed engine. "
        "Counts are sums over the runs; the gap is the longest pause in a stream that continued after the kill.",
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
    parser.add_argument("--name", default="streams", help="Name of the result files in bench/results.")
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
