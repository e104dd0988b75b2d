"""Runs the same programs, open loop, through public routers and ours in front of the same modelled engines.

    python -m bench.programs.peers [--rounds 2] [--window 1.25] [--policy cost]

All systems stay up for the whole benchmark. In each round every workload runs through all systems in turn, with texts
that no engine has seen before.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from itertools import count

from bench.http_servers import sim_servers
from bench.programs.live.samples import ENGINES, HIGH, LOW, SLOTS, STOCK, WORKLOADS, sample
from bench.programs.peers import page as peer_page
from bench.programs.peers import run as peer_run
from bench.programs.peers.systems import SYSTEMS, Running, Stage, System, over_http
from bench.programs.systems import OURS
from bench.report.machine import here, server_name
from bench.report.page import publish
from rsm.broker import Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect

# Pause between two runs, so that the first one's leftovers (ends of calls, evictions) are finished.
_REST_S = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """What to play: rounds, seconds during which programs arrive, workloads."""

    rounds: int
    window_s: float
    workloads: Sequence[str]

    def load_and_window(self, workload: str) -> tuple[float, float]:
        low = LOW, peer_page.LOW_WINDOWS * self.window_s
        return low if workload == peer_page.ALL else (HIGH, self.window_s)


async def measure(plan: Plan, stage: Stage, systems: Sequence[System]) -> peer_page.Found:
    """Measures all runs, and the round trips of single calls through each system and directly to a server."""
    found = peer_page.Found(plan.rounds, plan.window_s)
    async with AsyncExitStack() as stack:
        up = [(system, await stack.enter_async_context(system.run(stage))) for system in systems]
        direct = await stack.enter_async_context(over_http(stage.servers[0].url))
        numbers = count(1)
        for turn in range(plan.rounds):
            found.direct_ms.append(await peer_run.round_trip_ms(direct, next(numbers)))
            for system, running in up:
                trip = await peer_run.round_trip_ms(running.serve, next(numbers))
                found.round_trips_ms.setdefault(system.label, []).append(trip)
            for workload in plan.workloads:
                load, window_s = plan.load_and_window(workload)
                if workload == peer_page.ALL:
                    found.chains.append(peer_page.chain(sample(workload, load, window_s, turn, 0)))
                print(f"round {turn + 1} of {plan.rounds}: {workload}", flush=True)
                for system, running in _rotated(up, turn):
                    programs = sample(workload, load, window_s, turn, next(numbers))
                    run = await peer_run.play(running, [s.process.pid for s in stage.servers], programs)
                    found.add(workload, system.label, run)
                    print(f"  {peer_page.line(system.label, run)}", flush=True)
                    await asyncio.sleep(_REST_S)
    return found


def _rotated(up: Sequence[tuple[System, Running]], turn: int) -> Sequence[tuple[System, Running]]:
    """Starts each round with a different system."""
    first = turn % len(up)
    return [*up[first:], *up[:first]]


def main() -> None:
    args = _arguments()
    systems = [s for s in SYSTEMS if not args.systems or any(wanted in s.label for wanted in args.systems)]
    plan = Plan(args.rounds, args.window, args.workloads)
    with ExitStack() as stack:
        embedded, log = stack.enter_context(EmbeddedRedis()), stack.enter_context(tempfile.TemporaryFile())
        servers = stack.enter_context(sim_servers(ENGINES, STOCK, log, SLOTS))
        server = connect(Settings().with_redis(embedded.url))
        about = here(Server=server_name(server.info("server")))
        server.close()
        found = asyncio.run(measure(plan, Stage(embedded.url, servers, log, args.policy), systems))
    publish(peer_page.report(about, systems, found), args.name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--window", type=float, default=1.25, help="Seconds during which a run's programs arrive.")
    parser.add_argument("--policy", default=OURS.policy, help="RSM_POLICY of our routers.")
    parser.add_argument("--workloads", nargs="*", default=[*WORKLOADS, peer_page.ALL])
    parser.add_argument("--systems", nargs="*", default=[], help="Words in the names of the systems. Default: all.")
    parser.add_argument("--name", default="program_peers", help="Name of the result files in bench/results.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
