"""The `rsm` command. Each module registers its commands with the one application."""

from __future__ import annotations

from rsm.engine.cli import acl, calibrate, calls, dead, demo, doctor, drain, parts, show, sim_server, simulate
from rsm.engine.cli.app import app

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
    "parts",
    "show",
    "sim_server",
    "simulate",
]


def main() -> None:
    """Entry point of the console script."""
    app()
