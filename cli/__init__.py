"""The `rsm` command. Each module registers its commands with the one application."""

from __future__ import annotations

from rsm.cli.app import app
from rsm.cli.commands import (
    acl,
    calibrate,
    calls,
    dead,
    demo,
    doctor,
    drain,
    processes,
    sim_server,
    simulate,
    up,
    views,
)

__all__ = ["app", "main"]

_COMMANDS = (acl, calibrate, calls, dead, demo, doctor, drain, processes, sim_server, simulate, up, views)


def main() -> None:
    """Entry point of the console script."""
    app()
