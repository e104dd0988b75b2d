"""`python -m chaos --minutes 30 --seed 1`: runs the chaos tests; exit status 0 if every promise was kept."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from chaos import report
from chaos.run import run
from rsm.broker import logs
from rsm.broker.settings import Settings

_REPORT_MIN = 10  # a shorter run is only a check and does not change the page
_SHOWN = 20  # the folder of the run has all violations


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--vllm", type=int, default=0, metavar="N", help="Workers with real vLLM, in addition to those with sim."
    )
    parser.add_argument(
        "--report",
        type=Path,
        help=f"Page whose chaos section gets the figures. Runs below {_REPORT_MIN} minutes leave it as it is.",
    )
    args = parser.parse_args()
    logs.configure(Settings(), "chaos")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all processes are stopped on exit
    outcome = run(args.seed, args.minutes, args.vllm)
    data = report.as_json(outcome)
    print(report.render([data]))
    for violation in outcome.violations[:_SHOWN]:
        print(violation)
    if args.report is not None and args.minutes >= _REPORT_MIN:
        report.save(outcome)
        report.into(args.report)
    print("every promise was kept" if not outcome.violations else f"{len(outcome.violations)} promises were broken")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
