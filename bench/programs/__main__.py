"""`python -m bench.programs explore …`: a quick look."""

from __future__ import annotations

import argparse

from bench.programs import explore


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.programs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    explore.add_arguments(commands.add_parser("explore", help=explore.__doc__))
    args = parser.parse_args()
    explore.explore(args)


if __name__ == "__main__":
    main()
