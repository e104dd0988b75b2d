"""The `rsm` command. Each module registers its commands with the one application."""

from __future__ import annotations

from rsm.cli.app import app
from rsm.cli.commands import acl, calibrate, calls, dead, demo, doctor, drain, nodes, sim_server, simulate
from rsm.cli.commands import processes as parts
from rsm.cli.commands import views as show

__all__ = [
    "acl",
    "app",
    "calibrate",
    "calls",
    "dead",
    "demo",
    "doctor",
    "drain",
    "main",
    "nodes",
    "parts",
    "show",
    "sim_server",
    "simulate",
]


def main() -> None:
    """Entry point of the console script."""
    app()
