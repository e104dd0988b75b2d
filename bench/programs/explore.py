"""A quick comparison of systems on one workload at some rates, printed line by line."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from bench.programs.cells import WINDOW_S, WORKLOADS, Cell, Outcome, outcomes
from bench.programs.systems import SYSTEMS

HEAD = (
    f"{'workload':9}{'system':17}{'rate':>7}{'progr.':>7} | {'mean':>7}{'P95':>7}{'P99':>7} ms/token | "
    f"{'JCT':>6}{'P99':>6} s | {'hit':>5}{'busy':>6}{'Jain':>6}{'starved':>8}{'wait':>6} s | by kind, ms/token"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", default="mixed", choices=WORKLOADS)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--policy", default="ours,fcfs_rr", help=f"Some of {', '.join(SYSTEMS)}; or all.")
    parser.add_argument("--rates", default="1,2,4", help="Programs per second that arrive at the whole fleet.")
    parser.add_argument(
        "--window", type=float, default=0, help="Seconds during which they arrive. Default: that of the workload."
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="Number of processes.")


def explore(args: argparse.Namespace) -> None:
    """Prints a line for each cell as soon as its outcome is known."""
    names = list(SYSTEMS) if args.policy == "all" else args.policy.split(",")
    window = args.window or WINDOW_S[args.workload]
    rates = [float(r) for r in args.rates.split(",")]
    cells = [Cell(args.workload, n, args.engines, r, window, args.seed) for r in rates for n in names]
    print(HEAD)
    for line in lines(outcomes(cells, args.jobs)):
        print(line, flush=True)


def lines(found: Iterable[tuple[Cell, Outcome]]) -> Iterable[str]:
    for cell, o in found:
        f = o.figures
        kinds = ", ".join(f"{kind} {1000 * v:.1f}" for kind, v in f.by_kind.items())
        per_token = "".join(f"{1000 * v:7.1f}" for v in (f.per_token_mean, f.per_token_p95, f.per_token_p99))
        yield (
            f"{cell.workload:9}{cell.system:17}{cell.rate:7.3g}{f.programs:7} | {per_token}          | "
            f"{f.jct_mean:6.0f}{f.jct_p99:6.0f}   | {f.hit_rate:5.3f}{o.busy:6.2f}{f.jain:6.2f}{f.starved:8}"
            f"{f.longest_wait:6.0f}   | {kinds} | {o.until_s:.0f} s in {o.wall_s:.1f}"
        )
