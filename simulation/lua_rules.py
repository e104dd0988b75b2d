"""The broker's rules, programs.lua and residents.lua, run unchanged in a Lua interpreter in this process."""

from __future__ import annotations

from functools import cache
from typing import Any

from rsm.broker.errors import InvalidRequest
from rsm.broker.protocol.scripts import source

_FILES = ("programs", "residents")
_NAMES = (
    "level_of", "charged", "served", "unpaid", "starves_at", "place", "queue_score", "RUN_FLOOR_MS",
    "spoken_for", "share_of", "is_cached_here", "fits", "arrives", "leaves", "admissible", "decayed",
    "up_to", "tier_of", "BYPASS", "LAST_TIER", "PROMOTE_MANY", "MOST_DEEP", "totals",
)  # fmt: skip
MISSING = "Simulating a fleet needs lupa, a Lua for Python: pip install 'rsm-engine[simulation]'."


@cache
def rules() -> Any:
    """The rules as attributes, callable with numbers. `list(items)` makes a Lua list, or a table from a dict.

    Raises:
        InvalidRequest: lupa is not installed.
    """
    try:
        from lupa.lua51 import LuaRuntime  # Redis's version
    except ImportError as e:
        raise InvalidRequest(MISSING) from e
    lua = LuaRuntime()
    text = "\n".join(source(name) for name in _FILES)
    table: Any = lua.execute(f"{text}\nreturn {{{', '.join(f'{n} = {n}' for n in _NAMES)}}}")
    table.list = lua.table_from
    return table
