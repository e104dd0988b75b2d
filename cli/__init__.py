"""The `rsm` command. Each module in `commands` registers its commands with the application."""

from __future__ import annotations

import sys

from rsm.cli.app import app
from rsm.cli.commands import (
    acl,
    calibrate,
    calls,
    dead,
    demo,
    doctor,
    drain,
    nodes,
    processes,
    sim_server,
    simulate,
    up,
    views,
)
from rsm.cli.streams import OutputLost, as_utf8, ended, guard

__all__ = ["app", "main"]

_COMMANDS = (acl, calibrate, calls, dead, demo, doctor, drain, nodes, processes, sim_server, simulate, up, views)


def main() -> None:
    """Entry point of the console script."""
    guard()
    sys.argv[1:] = map(as_utf8, sys.argv[1:])
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OutputLost as lost:
        sys.exit(ended(lost))
