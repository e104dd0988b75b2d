"""A Lua interpreter in this process, of the version that Redis has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from lupa.lua51 import LuaRuntime, LuaSyntaxError

from rsm.broker.protocol.scripts import source

LOCALS = 200  # Lua's limit for one function
PREFIX = "{test}:"
ARGS = (3_600_000, 3_600_000, "0 0 0 0 0 0")


@cache
def _lua() -> Any:
    return LuaRuntime()


def locals_left(text: str) -> int:
    """How many more locals the main function of a script may have. Raises ValueError if it does not compile."""
    left = -1
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        if left + step <= LOCALS and _compiles(text, left + step):
            left += step
    if left < 0:
        raise ValueError("the script does not compile, even without further locals")
    return left


def _compiles(text: str, more: int) -> bool:
    names = ", ".join(f"_spare{n}" for n in range(more))
    try:
        _lua().compile(f"local {names}\n{text}" if more else text)
    except LuaSyntaxError:
        return False
    return True


def run_modules(
    *names: str, exports: Sequence[str], call: Callable[..., Any] | None = None, args: Sequence[Any] = ARGS
) -> Any:
    """Runs modules in order. Returns an object with some of their locals as attributes.

    Args:
        call: a stand-in for Redis. Its lists become Lua tables, with False for missing values. Without it, `TIME` is 0.
        args: ARGV, as lib.lua reads it.
    """
    lua = LuaRuntime()
    scope = lua.globals()

    def answer(command: str, *of: Any) -> Any:
        reply = call(command, *of) if call else None
        if reply is None and command == "TIME":
            reply = [0, 0]
        return lua.table_from(reply) if isinstance(reply, (list, dict)) else reply

    scope.KEYS, scope.ARGV = lua.table_from([PREFIX]), lua.table_from(list(args))
    scope.redis = lua.table_from({"call": answer})
    text = "\n".join(source(name) for name in names)
    made = lua.execute(f"{text}\nreturn {{{', '.join(f'{name} = {name}' for name in exports)}}}")
    made.list = lua.table_from
    return made
