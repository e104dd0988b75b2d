"""Lua scripts as typed commands: one file per transition, loaded once, run with EVALSHA.

A `Command` is a script with its arguments and a parser for its reply. It does no I/O, so the synchronous and the
asynchronous client can run the same commands.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Arg = str | bytes | int | float

_LUA = files("rsm.broker.protocol") / "lua"
_TRANSITIONS = _LUA / "transitions"
_FOLDERS = (_TRANSITIONS, _LUA / "modules")
_INCLUDE = re.compile(r"^--- @include (.+)\n")


@dataclass(frozen=True, slots=True)
class Script:
    """A script with its included modules."""

    name: str
    text: str = field(repr=False)
    sha: str


@cache
def script(name: str) -> Script:
    """The script lua/transitions/NAME.lua, preceded by the modules that its first line names."""
    text = "\n".join(part for _, part in parts(name))
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def parts(name: str) -> list[tuple[str, str]]:
    """The names and texts that make up a script, in order: the included modules, then its own text."""
    text = source(name)
    head = _INCLUDE.match(text)
    if not head:
        return [(name, text)]
    return [*((module, source(module)) for module in head[1].split()), (name, text[head.end() :])]


def source(name: str) -> str:
    """The text of one Lua file, without its includes."""
    found = next(path for folder in _FOLDERS if (path := folder / f"{name}.lua").is_file())
    return found.read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Command(Generic[T]):
    """One script call: its arguments, and a parser for the reply."""

    script: Script
    args: Sequence[Arg] = field(repr=False)
    parse: Callable[[Any], T]


def all_scripts() -> list[Script]:
    """All transitions."""
    return [script(entry.name.removesuffix(".lua")) for entry in _TRANSITIONS.iterdir()]
