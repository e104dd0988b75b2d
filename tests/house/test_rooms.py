"""The rooms of docs/architecture.md: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.paths import LUA, ROOT

ROOMS = {
    "broker": set(),
    "router": {"broker"},
    "workers": {"broker"},
    "simulation": {"broker", "router", "workers"},
    "engine": {"broker", "router", "workers", "simulation"},
    "chaos": {"broker", "router", "workers", "engine"},
}
# A producer installs the base and uses broker alone.
HEAVY = {"lupa", "matplotlib", "vllm", "torch", "transformers", "httpx", "fastapi", "starlette", "uvicorn"}


def imported_roots(path: Path, *, at_import: bool) -> set[str]:
    """Top-level packages that a file imports; `at_import` leaves out what only functions import."""
    tree = ast.parse(path.read_text())
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    if at_import:
        nodes = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    return {name.removeprefix("rsm.").partition(".")[0] for name in names}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down_only(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        seen = imported_roots(path, at_import=False) & ROOMS.keys()
        assert seen <= ROOMS[room] | {room}, f"{path.relative_to(ROOT)} imports {seen - ROOMS[room] - {room}}"


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_heavy_is_imported_with_a_module(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        heavy = imported_roots(path, at_import=True) & HEAVY
        # The guard is imported by vLLM's own child process alone.
        assert not heavy or path.name == "vllm_guard.py", f"{path.relative_to(ROOT)} imports {heavy}"


def test_every_script_is_a_transition_and_says_what_it_takes() -> None:
    for path in sorted((LUA / "transitions").glob("*.lua")):
        text = path.read_text()
        assert text.startswith("--- @include"), f"{path.name} does not say what it is made of"
        assert "-- ARGV" in text, f"{path.name} does not say what it takes"
        assert "-- Returns" in text or "Returns" in text, f"{path.name} does not say what it returns"
