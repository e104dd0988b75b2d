"""`python -m chaos --minutes 30 --seed 1`: exit status 0 if every promise was kept."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from chaos import report
from chaos.run import run
from rsm.broker import logs
from rsm.broker.settings import Settings

_WORTH_A_REPORT = 10  # minutes; a shorter run is a check, and leaves the page as it is
_SHOWN = 20  # all of them are in the folder of the run


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--vllm", type=int, default=0, metavar="N", help="workers with real vLLM, beside those with sim"
    )
    parser.add_argument("--report", type=Path, help="a page to put the figures in, between its chaos marks")
    args = parser.parse_args()
    logs.configure(Settings(), "chaos")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is stopped on the way out
    outcome = run(args.seed, args.minutes, args.vllm)
    data = report.as_json(outcome)
    print(report.render([data]))
    for violation in outcome.violations[:_SHOWN]:
        print(violation)
    if args.report is not None and args.minutes >= _WORTH_A_REPORT:
        report.save(outcome)
        report.into(args.report)
    print("every promise was kept" if not outcome.violations else f"{len(outcome.violations)} promises were broken")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
