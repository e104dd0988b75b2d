"""Measures recovery after `kill -9`: the second attempt, compared with SAQ, taskiq and RQ, and our own scenarios.

    python -m bench.recovery [--rounds 5] [--copies 3] [--limit 180] [--name recovery]

The peers run first, all at the same time, since they mostly wait. Then our own scenarios run one after the other, with
the default settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench.recovery.ours import BUSY_CALLS_PER_S, SCENARIOS, Scenario, measure, supervised_worker, unsupervised_worker
from bench.report.machine import machine, server_name
from bench.report.page import write
from bench.report.table import table_line
from bench.venvs import PEERS, python_for
from rsm.broker import Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect

QUEUES = ("saq", "taskiq", "rq")
PROFILES = ("default", "tuned")
# Time that a peer's script may take beyond its waiting: the start of its workers, and a job.
_MARGIN_S = 200
# Delay between the starts of two scripts, since they would all start slowly at once.
_STAGGER_S = 0.5


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer's times from the kill to the second attempt, in seconds; None: it did not start within the limit."""

    name: str
    version: str
    settings: str
    seconds: list[float | None]


@dataclass(frozen=True, slots=True)
class Ours:
    """The times of one of our scenarios, in seconds, one per round."""

    name: str
    busy: bool
    limit_s: float
    seconds: list[float]

    @property
    def worst(self) -> float:
        return max(self.seconds)

    def cells(self) -> tuple[str, ...]:
        met = "yes" if self.worst <= self.limit_s else "**no**"
        times = (f"{median(self.seconds):.2f}", f"{self.worst:.2f}")
        return (self.name, "busy" if self.busy else "idle", f"≤ {self.limit_s:g}", *times, str(len(self.seconds)), met)


def run_peers(url: str, limit_s: float, copies: int) -> list[Peer]:
    """Runs all peers with all their profiles at the same time, `copies` times each."""
    runs = [(name, profile, python_for(name)) for name in QUEUES for profile in PROFILES]
    processes: list[list[subprocess.Popen[bytes]]] = []
    try:
        for name, profile, python in runs:
            options = ["--redis", url, "--limit", str(limit_s), "--profile", profile]
            processes.append([_start([python, PEERS / f"{name}_recovery.py", *options]) for _ in range(copies)])
        return [_together([_result(process, limit_s) for process in group], limit_s) for group in processes]
    finally:
        for process in (p for group in processes for p in group):
            process.kill()
            process.wait()


def _start(command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
    time.sleep(_STAGGER_S)
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def _result(process: subprocess.Popen[bytes], limit_s: float) -> dict[str, Any]:
    out, _ = process.communicate(timeout=limit_s + _MARGIN_S)
    if process.returncode:
        raise RuntimeError(
            f"The peer's script failed with status {process.returncode}; run it by hand: {process.args!r}"
        )
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def _together(results: Sequence[dict[str, Any]], limit_s: float) -> Peer:
    peer = Peer(**(results[0] | {"seconds": [r["seconds"] for r in results]}))
    print(f"  {peer.name} ({peer.settings}): {shown(peer.seconds, limit_s)}", flush=True)
    return peer


def run_ours(url: str, rounds: int) -> list[Ours]:
    found = []
    for scenario in SCENARIOS:
        for busy in (False, True):
            seconds = [measure(url, scenario, busy) for _ in range(rounds)]
            found.append(Ours(scenario.name, busy, scenario.limit_s, seconds))
            print("  " + ", ".join(found[-1].cells()), flush=True)
    return found


def shown(seconds: Sequence[float | None], limit_s: float) -> str:
    """Formats all times of a peer, the shortest first."""
    times = [f"{s:.1f} s" for s in sorted(s for s in seconds if s is not None)]
    missed = len(seconds) - len(times)
    return ", ".join([*times, *([f"none within {limit_s:g} s ({missed} of {len(seconds)})"] if missed else [])])


# -- the page


def second_attempts(peers: Sequence[Peer], ours: Sequence[Ours], limit_s: float) -> list[str]:
    """Returns the table that compares ours with the peers."""
    lines = [table_line(("System", "Version", "Settings", "kill -9 → second attempt")), table_line(["---"] * 4)]
    for settings, scenario in (
        ("defaults, supervised (`rsm up`)", _named(supervised_worker)),
        ("defaults, unsupervised worker", _named(unsupervised_worker)),
    ):
        runs = next(o for o in ours if o.name == scenario.name and not o.busy)
        times = f"{median(runs.seconds):.2f} s (worst of {len(runs.seconds)}: {runs.worst:.2f} s)"
        lines.append(table_line(("rsm-engine", version("rsm-engine"), settings, times)))
    lines += [table_line((p.name, p.version, p.settings, shown(p.seconds, limit_s))) for p in peers]
    return lines


def _named(run: Any) -> Scenario:
    return next(s for s in SCENARIOS if s.run is run)


def page(about: Mapping[str, str], peers: Sequence[Peer], ours: Sequence[Ours], limit_s: float) -> str:
    lines = [f"# Recovery after `kill -9`: {about['Machine']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "Machine"]
    lines += ["", "## Second attempt, compared with other queues", ""]
    lines += [
        "A worker is killed in the middle of a job of some seconds and restarted at once; a second worker runs all the "
        "time. Each system runs with its defaults, as far as they retry a lost job at all, and with options tuned for "
        "speed.",
        "",
        *second_attempts(peers, ours, limit_s),
        "",
        "## Our own times, with the defaults",
        "",
        "Seconds. When a worker dies, the time is that of the last of its calls. Busy: "
        f"{BUSY_CALLS_PER_S} additional short calls per second.",
        "",
        table_line(("What", "Load", "Target", "Median", "Worst", "Runs", "Met")),
        table_line(["---", "---", "---:", "---:", "---:", "---:", "---"]),
        *(table_line(o.cells()) for o in ours),
        "",
        "Made by `make bench-crash`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="Rounds of each of our scenarios.")
    parser.add_argument("--copies", type=int, default=3, help="Parallel runs of each peer with each profile.")
    parser.add_argument("--limit", type=float, default=180, help="Seconds to wait for a peer's second attempt.")
    parser.add_argument("--name", default="recovery", help="Name of the result files in bench/results.")
    args = parser.parse_args()
    with EmbeddedRedis() as embedded:
        server = connect(Settings().with_redis(embedded.url))
        about = machine(f"{os.cpu_count()} cores, shared with others", server_name(server.info("server")))
        server.close()
        peers = run_peers(embedded.url, args.limit, args.copies)
        ours = run_ours(embedded.url, args.rounds)
    write(args.name, page(about, peers, ours, args.limit), {
        "machine": about,
        "limit_s": args.limit,
        "peers": [asdict(p) for p in peers],
        "ours": [asdict(o) for o in ours],
    })  # fmt: skip


if __name__ == "__main__":
    main()
