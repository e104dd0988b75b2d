"""`python -m bench.vllm steps|waits|same|cpu …`: real vLLM without the broker, on a GPU or the CPU."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from bench.vllm import cpu, engine, steps, waits


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.vllm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in (("steps", steps), ("waits", waits)):
        command = commands.add_parser(
            name, help=(module.__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        engine.add_arguments(command)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    command = commands.add_parser("same", help="Check whether two runs gave the same tokens.")
    command.add_argument("folders", type=Path, nargs=2)
    command = commands.add_parser("cpu", help=(cpu.__doc__ or "").partition("\n")[0])
    cpu.add_arguments(command)
    command.set_defaults(run=cpu.run)
    args = parser.parse_args()
    if args.command == "same":
        print("\n".join(waits.same(*args.folders)))
    else:
        asyncio.run(args.run(args))


if __name__ == "__main__":
    main()
