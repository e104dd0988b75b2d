"""`make bench`: compares rsm-engine with its peers in interleaved rounds; writes a page and a JSON file with medians.

    python -m bench.queue [--rounds 3] [--name NAME]

Each peer has its own virtual environment, built on first use. All systems use one server over one unix socket. The
server is emptied between runs, so no system pays for another's leftovers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from bench.queue import figures, page
from bench.queue.page import Run
from bench.report.machine import server_name
from bench.report.page import ROOT
from bench.venvs import python_for
from rsm.broker import Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect

HERE = Path(__file__).resolve().parent
BENCH = HERE.parent
CALLS = {"rsm-engine": 20_000, "raw": 50_000, "saq": 4_000, "taskiq": 4_000, "rq": 1_500}
INFLIGHT = 100
RUN_S = 300


def command(system: str) -> list[str]:
    if system == "rsm-engine":
        return [sys.executable, "-m", "bench.queue.ours"]
    if system == "raw":
        return [sys.executable, str(HERE / "raw_ceiling.py")]
    return [str(python_for(system)), str(BENCH / "peers" / f"{system}_peer.py")]


def run_once(system: str, url: str) -> dict[str, Any]:
    """Runs one system once; the last line that it prints is the result."""
    args = ["--redis", url, "--calls", str(CALLS[system]), "--inflight", str(INFLIGHT), "--json"]
    done = subprocess.run([*command(system), *args], stdout=subprocess.PIPE, check=True, timeout=RUN_S)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {result['name']}: {result['calls_per_s']:,.0f} calls/s, p50 {result['rtt_p50_ms']:.2f} ms", flush=True)
    return result


def measure_ours(url: str, server_pid: int) -> dict[str, Any]:
    """Measures once the figures that have no peer."""
    found: dict[str, Any] = {}
    for measure in (figures.router_alone, figures.cancellation, figures.memory):
        found |= measure(url)
    found |= figures.trips_per_call(url, CALLS["rsm-engine"] // 2, INFLIGHT)
    found |= figures.cpu_per_call(url, server_pid, CALLS["rsm-engine"] // 2, INFLIGHT)
    print("  " + ", ".join(f"{k} {v:.2f}" for k, v in found.items() if isinstance(v, float)), flush=True)
    return found


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    first = rounds[0]
    return {k: median(r[k] for r in rounds) if isinstance(v, float) else v for k, v in first.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="broker", help="Name of the result files in bench/results.")
    args = parser.parse_args()
    runs, ours = [], []
    with EmbeddedRedis() as embedded:
        server = connect(Settings().with_redis(embedded.url))
        about = server_name(server.info("server"))
        for i in range(args.rounds):
            print(f"round {i + 1} of {args.rounds}", flush=True)
            for system in CALLS:
                runs.append(Run.parse(json.dumps(run_once(system, embedded.url))))
                server.flushall()
            ours.append(measure_ours(embedded.url, embedded.pid or 0))
            server.flushall()
        server.close()
    path = page.write(args.name, runs, medians(ours), about)
    page.into_docs(path, ROOT / "docs" / "performance.md")
    print(path.read_text())


if __name__ == "__main__":
    main()
