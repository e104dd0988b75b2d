"""lua/programs.lua in a Lua of this process: the broker's own text, with a list of what it defines behind it."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

_NAMES = ("level_of", "charged", "unpaid", "starves_at", "queue_score", "RUN_FLOOR_MS")


@cache
def rules() -> Any:
    """The rules as attributes; `list(items)` makes a Lua list."""
    from lupa.lua51 import LuaRuntime  # Redis's version

    lua = LuaRuntime()
    text = (files("broker") / "lua" / "programs.lua").read_text(encoding="utf-8")
    table: Any = lua.execute(f"{text}\nreturn {{{', '.join(f'{n} = {n}' for n in _NAMES)}}}")
    table.list = lua.table_from
    return table
