"""Measures the cost of choosing an engine, by policy and fleet size: a router in this process, on a real Redis.

    python -m bench.programs.routing_cost [--rounds 3] [--calls 2000] [--batches 40] [--name routing_cost]

The registered engines never claim, so only the router and Redis do work. The engines differ in speed and load, and the
calls come from programs with previous service and cached contexts, so every part of the choice has work to do:

- alone: one call at a time, from reading its entry to its assignment, including the computation of its level.
- batch: `RSM_BATCH` calls at a time; times are per call.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from statistics import median, quantiles
from typing import Any, NamedTuple

import redis

from bench.programs.systems import OURS, PAPER
from bench.report.machine import here, server_name
from bench.report.page import Report, Target, publish, targets_table
from bench.report.table import Spread, table_line
from rsm.broker import Client, Settings
from rsm.broker.connection import execute
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.models import EngineState
from rsm.broker.protocol.snapshot import Speed
from rsm.broker.protocol.transitions import Transitions
from rsm.router.router import Router

FLEETS = (4, 64)
# Each policy with its usual settings; "autellix" is this project's improved version of the paper's rule.
POLICIES: Mapping[str, Mapping[str, Any]] = {OURS.policy: OURS.settings, "autellix": PAPER.settings}
_SESSIONS = 500
_SLOTS = 256
# No engine's cache is ever full, because a throttled call would not be placed.
_KV_TOKENS = 10**9
_AIM_MS = 1.0
Fields = dict[bytes | bytearray | memoryview | str | int | float, bytes | bytearray | memoryview | str | int | float]


class Placing(NamedTuple):
    """A call's seconds in the router, and those of the choice alone; `looked`: the router refreshed its fleet view."""

    all_s: float
    choice_s: float
    looked: bool


@dataclass(slots=True)
class Watched:
    """A router whose choices are timed and whose round trips are counted."""

    router: Router
    chose_s: list[float] = field(default_factory=list)
    trips: int = 0

    def __post_init__(self) -> None:
        chooser: Any = self.router._chooser
        line: Any = self.router._connection
        place, exchange = chooser.place, line.exchange

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            found = place(*args)
            self.chose_s.append(time.perf_counter() - began)
            return found

        def counted(commands: Any) -> Any:
            self.trips += 1
            return exchange(commands)

        chooser.place, line.exchange = timed, counted

    def place(self, calls: int) -> Placing:
        """Places one batch, which must have `calls` calls."""
        entries = self.router._read()
        self.chose_s.clear()
        looked = self.router._seen_at
        began = time.perf_counter()
        placed = self.router.place(entries)
        took = time.perf_counter() - began
        if placed != calls:
            raise RuntimeError(
                f"A batch had {placed} calls instead of {calls}: not all pushed calls were read at once."
            )
        return Placing(took / calls, sum(self.chose_s) / calls, self.router._seen_at != looked)


def measure(url: str, policy: str, engines: int, calls: int, batches: int) -> dict[str, Any]:
    """Returns times in ms, over `calls` single calls and `batches` full batches."""
    more = {"policy": policy, **POLICIES[policy]}
    settings = Settings(namespace=f"bench-{new_id()}", max_session_calls=0, **more).with_redis(url)
    server = connect(settings)
    dice = random.Random(1)
    _fleet(server, settings, engines, dice)
    _programs(server, settings, engines, dice)
    watched = Watched(Router(settings))
    watched.router._prepare()
    with Client(settings=settings) as client:
        push = _pusher(client, dice)
        alone = [_placed(watched, push, 1) for _ in range(calls)]
        watched.trips = 0
        full = [_placed(watched, push, settings.batch) for _ in range(batches)]
    found = figures("alone", alone) | figures("batch", full)
    queued = sum(server.zcard(Keys(settings.namespace).queue(name)) for name in _names(engines))
    server.close()
    if queued != calls + batches * settings.batch:
        raise RuntimeError(f"{queued} calls were placed instead of {calls + batches * settings.batch}.")
    return found | {"trips_a_call": watched.trips / (batches * settings.batch), "batch": settings.batch}


def _placed(watched: Watched, push: Callable[[int], None], calls: int) -> Placing:
    push(calls)
    return watched.place(calls)


def figures(name: str, placings: Sequence[Placing]) -> dict[str, float]:
    """Returns times in ms, by name."""
    looked = [p.all_s for p in placings if p.looked]
    found = {f"{name}_looked": len(looked) / len(placings), f"{name}_looked_p50_ms": 1000 * median(looked or [0.0])}
    times = {"all": [p.all_s for p in placings], "choice": [p.choice_s for p in placings]}
    for what, values in times.items():
        cuts = quantiles((1000 * v for v in values), n=100, method="inclusive")
        found |= {f"{name}_{what}_p50_ms": cuts[49], f"{name}_{what}_p99_ms": cuts[98]}
    return found


def _names(engines: int) -> list[str]:
    return [f"e{n}" for n in range(engines)]


def _fleet(server: redis.Redis, settings: Settings, engines: int, dice: random.Random) -> None:
    """Registers engines with reports like those of their workers."""
    transitions = Transitions(Keys(settings.namespace), settings)
    for name in _names(engines):
        load: dict[str, str | float] = {
            "speed": str(Speed(dice.uniform(0.004, 0.008), dice.uniform(1e-5, 4e-5), dice.uniform(1e-5, 3e-5))),
            "kv_usage": dice.random(),
            "computed": dice.randrange(_KV_TOKENS),
            "completion_tokens": dice.uniform(20, 400),
            "cache_age_s": dice.uniform(10, 1000),
            "reuse_found": dice.uniform(0.7, 1.0),
        }
        about: dict[str, str | int] = {"model": "noop", "max_num_seqs": _SLOTS, "kv_tokens": _KV_TOKENS}
        assert execute.run(server, transitions.register(name, "bench", about)).ok
        assert execute.run(server, transitions.heartbeat(name, "bench", EngineState.READY, load))


def _programs(server: redis.Redis, settings: Settings, engines: int, dice: random.Random) -> None:
    """Writes the service and the cached contexts of programs, as if they had run for a while."""
    keys, now_ms = Keys(settings.namespace), int(1000 * time.time())
    pipe = server.pipeline(transaction=False)
    for n in range(_SESSIONS):
        service = int(10 ** dice.uniform(1, 6))
        had: Fields = {"service": service, "waited_ms": service // 8, "ran_ms": service, "completed": 5}
        had["completion_tokens"] = dice.randint(100, 4000)
        pipe.hset(keys.session(f"s{n}"), mapping=had)
        holders = dice.sample(_names(engines), 2)
        cached: Fields = {e: f"{dice.randint(500, 8000)}:{now_ms}:{dice.randrange(_KV_TOKENS)}" for e in holders}
        pipe.hset(keys.affinity(f"s{n}"), mapping=cached)
    pipe.execute()


def _pusher(client: Client, dice: random.Random) -> Callable[[int], None]:
    sessions: Iterator[str] = cycle(f"s{n}" for n in range(_SESSIONS))

    def push(count: int) -> None:
        made = [
            client.prepare("x", session=next(sessions), prompt_tokens=dice.randint(200, 8000), max_tokens=1)
            for _ in range(count)
        ]
        client.submit_many(made)

    return push


# -- the table


Found = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]
_COLUMNS = (
    ("alone: p50, ms", "alone_all_p50_ms"),
    ("p99, ms", "alone_all_p99_ms"),
    ("with a refreshed view", "alone_looked"),
    ("p50, ms", "alone_looked_p50_ms"),
    ("choice: p50, ms", "alone_choice_p50_ms"),
    ("p99, ms", "alone_choice_p99_ms"),
    ("in a batch, per call: p50, ms", "batch_all_p50_ms"),
    ("p99, ms", "batch_all_p99_ms"),
    ("choice: p50, ms", "batch_choice_p50_ms"),
    ("p99, ms", "batch_choice_p99_ms"),
    ("round trips per call", "trips_a_call"),
)


def section(found: Found) -> list[str]:
    first = next(iter(found.values()))
    return [
        "Time to place a call in a router, from reading its entry to its assignment, including its level: alone, and "
        f"in batches of {first[0]['batch']}. The choice is the policy's share, in Python. A router refreshes its view "
        "of the fleet when it is older than 20 ms. Round trips include reading the stream. "
        f"Medians of {len(first)} interleaved rounds, with minimum and maximum of the p99 of calls alone.",
        "",
        table_line(("Policy", "Engines", *(name for name, _ in _COLUMNS))),
        table_line(["---", *["---:"] * (1 + len(_COLUMNS))]),
        *(table_line((policy, str(engines), *_cells(runs))) for (policy, engines), runs in found.items()),
        "",
        *targets_table(targets(found)),
    ]


def _cells(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for _, key in _COLUMNS:
        spread = Spread.of(run[key] for run in runs)
        if key == "alone_looked":
            yield f"{spread.median:.0%}"
        else:
            yield spread.text(3) if key == "alone_all_p99_ms" else f"{spread.median:.3f}"


def targets(found: Found) -> Iterator[Target]:
    for (policy, engines), runs in found.items():
        for key, what in (("choice", "choice"), ("all", "total time in the router")):
            p99 = median(run[f"alone_{key}_p99_ms"] for run in runs)
            about = f"{what}, p99, {policy}, {engines} engines"
            yield Target(about, f"< {_AIM_MS:g} ms", f"{p99:.2f} ms", p99 < _AIM_MS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=2000, help="Calls that are placed alone, in each run.")
    parser.add_argument("--batches", type=int, default=40, help="Full batches in each run.")
    parser.add_argument("--name", default="routing_cost", help="Name of the result files in bench/results.")
    args = parser.parse_args()
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with EmbeddedRedis() as embedded:
        server = connect(Settings().with_redis(embedded.url))
        about = here(Server=server_name(server.info("server")))
        for turn in range(args.rounds):
            for key in ((policy, engines) for engines in FLEETS for policy in POLICIES):
                run = measure(embedded.url, *key, args.calls, args.batches)
                found.setdefault(key, []).append(run)
                print(f"round {turn + 1} of {args.rounds}: {key[0]}, {key[1]} engines: {_summary(run)}", flush=True)
                server.flushall()
        server.close()
    data = {"runs": [{"policy": p, "engines": n, "rounds": runs} for (p, n), runs in found.items()]}
    title, command = "Cost of choosing an engine", "python -m bench.programs.routing_cost"
    publish(Report(title, about, section(found), data, command), args.name)


def _summary(run: Mapping[str, Any]) -> str:
    return (
        f"alone p99 {run['alone_all_p99_ms']:.2f} ms (choice {run['alone_choice_p99_ms']:.2f}), "
        f"in a batch p50 {run['batch_all_p50_ms']:.3f} (choice {run['batch_choice_p50_ms']:.3f})"
    )


if __name__ == "__main__":
    main()
