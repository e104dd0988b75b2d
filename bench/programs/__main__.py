"""Runs programs on fleets in virtual time, and a small case in real time.

python -m bench.programs explore …     a quick comparison of a few systems
python -m bench.programs run [--quick] all tables and plots: bench/results/programs*.{json,md,png}, docs/scheduling.md
python -m bench.programs real          the small case in real time, on real vLLM: bench/results/real.{json,md}
python -m bench.programs show [NAME]   page and plots again, from the JSON file
"""

from __future__ import annotations

import argparse

from bench.programs import explore, page, plots
from bench.programs import run as runner
from bench.programs.live import small
from bench.programs.plan import FULL, QUICK


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.programs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    explore.add_arguments(commands.add_parser("explore"))
    run = commands.add_parser("run")
    run.add_argument("--quick", action="store_true", help="Run a few cells, in minutes; keep docs/scheduling.md.")
    run.add_argument("--jobs", type=int, default=2, help="Number of processes.")
    small.add_arguments(commands.add_parser("real"))
    show = commands.add_parser("show")
    show.add_argument("name", nargs="?", default=FULL.name)
    args = parser.parse_args()
    if args.command == "explore":
        explore.explore(args)
    elif args.command == "real":
        small.main(args)
    elif args.command == "run":
        plan = QUICK if args.quick else FULL
        runner.write(plan, runner.run(plan, args.jobs))
        publish(plan.name)
    else:
        publish(args.name)


def publish(name: str) -> None:
    """Writes the page, the plots and, for a full run, the tables of docs/scheduling.md."""
    found = page.read(name)
    print(page.write(name, found))
    for path in plots.plot(found, name):
        print(path)
    if name == FULL.name:
        page.into_docs(found)


if __name__ == "__main__":
    main()
