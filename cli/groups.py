"""The order and the headings of commands in `rsm --help`."""

from __future__ import annotations

GROUPS: dict[str, tuple[str, ...]] = {
    "Start here": ("up", "demo", "doctor"),
    "Calls": ("submit", "cancel", "call", "ps", "dead"),
    "Fleet": ("engines", "sessions", "stats", "drain"),
    "Processes": ("router", "worker", "node", "start", "stop"),
    "Simulation": ("simulate", "calibrate", "sim-server"),
    "Admin": ("acl",),
}
# Processes that serve until a signal ends them.
SERVING = ("up", "router", "worker", "node", "sim-server")

_GROUP_OF = {command: group for group, commands in GROUPS.items() for command in commands}
_PLACES = {command: place for place, command in enumerate(_GROUP_OF)}


def group_of(command: str) -> str | None:
    """The heading of a command. None for one that is in no group; it comes last."""
    return _GROUP_OF.get(command)


def in_order(commands: list[str]) -> list[str]:
    return sorted(commands, key=lambda name: _PLACES.get(name, len(_PLACES)))
