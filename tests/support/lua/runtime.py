"""A Lua of this process, of the version that Redis has."""

from __future__ import annotations

from functools import cache
from typing import Any

from lupa.lua51 import LuaRuntime, LuaSyntaxError

LOCALS = 200  # that a function may have at once


@cache
def _lua() -> Any:
    return LuaRuntime()


def locals_left(text: str) -> int:
    """How many more locals the main function of a script could have. Raises ValueError: it does not compile."""
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
