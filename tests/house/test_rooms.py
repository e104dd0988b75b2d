"""The rooms of docs/architecture.md: who may import whom, how large a folder gets, and what a package promises."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.paths import LUA, ROOT

# From the ground up; each room may import those that its line names.
ROOMS = {
    "rsm.broker": set[str](),
    "rsm.router": {"rsm.broker"},
    "rsm.workers": {"rsm.broker"},
    "rsm.simulation": {"rsm.broker", "rsm.router", "rsm.workers"},
    "rsm.engine": {"rsm.broker", "rsm.router", "rsm.workers"},
    "rsm.cli": {"rsm.broker", "rsm.router", "rsm.workers", "rsm.simulation", "rsm.engine"},
    "rsm": {"rsm.broker", "rsm.engine", "rsm.cli"},
    "bench": {"rsm.broker", "rsm.router", "rsm.workers", "rsm.simulation", "rsm.engine"},
    "chaos": {"rsm.broker", "rsm.router", "rsm.workers", "rsm.engine", "bench"},
    "tests": {
        "rsm", "rsm.broker", "rsm.router", "rsm.workers", "rsm.simulation", "rsm.engine", "rsm.cli", "bench", "chaos",
    },
}  # fmt: skip
# Inside a room: a folder imports only those before it.
LAYERS = {
    "rsm.broker": ("protocol", "connection", "client", "views"),
    "rsm.workers": ("meters", "scheduling", "backends", "runtime", "supervision"),
    "rsm.cli": ("demo", "commands"),
    "bench": ("report", "queue", "recovery", "programs", "vllm"),
}
MOST_FILES = 13
# A producer installs the base and uses the broker alone. Others may be imported where they are named.
HEAVY = {"lupa", "matplotlib", "vllm", "torch", "transformers", "httpx", "fastapi", "starlette", "uvicorn"}
AT_HOME = {
    "typer": {"rsm.cli"},
    "rich": {"rsm.cli"},
    "rq": {"rsm.workers.supervision.node"},
}


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] != "rsm":
        return parts[0]
    return "rsm" if module in ("rsm", "rsm.frontend", "rsm.__main__") else f"rsm.{parts[1]}"


@cache
def modules() -> dict[str, Path]:
    """Every module of the house by its dotted name."""
    found = {}
    for room in ROOMS:
        folder = ROOT / room.removeprefix("rsm.")
        for path in folder.glob("*.py") if room == "rsm" else folder.rglob("*.py"):
            parts = [*room.split("."), *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path, *, at_import: bool = False) -> frozenset[str]:
    """Dotted names that a file imports, for its types too; `at_import` leaves out what only functions import."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_import else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def arrows(module: str) -> set[str]:
    """The modules of the house that a module imports."""
    known = modules()
    seen = (name if name in known else name.rpartition(".")[0] for name in imports(known[module]))
    return {name for name in seen if name in known} - {module}


def test_arrows_point_down_only() -> None:
    wrong = [
        f"{module} imports {other}"
        for module in modules()
        for other in arrows(module)
        if room_of(other) not in ROOMS[room_of(module)] | {room_of(module)}
    ]
    assert wrong == []


def test_layers_of_a_room() -> None:
    wrong = []
    for module in modules():
        room = room_of(module)
        layers = LAYERS.get(room, ())
        mine = module.removeprefix(f"{room}.").partition(".")[0]
        for other in arrows(module):
            theirs = other.removeprefix(f"{room}.").partition(".")[0]
            above = mine in layers and theirs in layers and layers.index(theirs) > layers.index(mine)
            if room_of(other) == room and above:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_no_circle() -> None:
    graph = {module: arrows(module) for module in modules()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as e:
        pytest.fail(f"a circle: {' -> '.join(e.args[1])}")


def test_no_folder_is_a_heap() -> None:
    sizes = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert {str(f.relative_to(ROOT)): n for f, n in sizes.items() if n > MOST_FILES} == {}


def test_every_package_says_what_it_promises() -> None:
    """`__all__` of a package is its public surface; where it is empty, the package is the house's own."""
    for module, path in modules().items():
        if path.name == "__init__.py" and module.startswith("rsm"):
            found = import_module(module)
            names = found.__all__
            assert len(set(names)) == len(names), module
            assert [name for name in names if not hasattr(found, name)] == [], module


def test_a_plugin_needs_its_room_alone() -> None:
    for example in (ROOT / "examples").rglob("*.py"):
        taken = {name.rpartition(".")[0] for name in imports(example) if name.startswith("rsm")}
        assert taken <= {"rsm", "rsm.broker", "rsm.router", "rsm.workers", "rsm.engine"}, example


def test_nothing_heavy_is_imported_with_a_module() -> None:
    for module, path in modules().items():
        if not module.startswith("rsm"):
            continue
        roots = {name.partition(".")[0] for name in imports(path, at_import=True)}
        # The guard is imported by vLLM's own child process alone.
        assert not roots & HEAVY or path.name == "guard.py", f"{module} imports {roots & HEAVY}"
        for package, homes in AT_HOME.items():
            assert package not in roots or any(module.startswith(home) for home in homes), f"{module} imports {package}"


# Whoever may look into the environment, and for what.
ENVIRONMENT = {
    "rsm.broker.settings": "the settings themselves, and folders",
    "rsm.broker.child_process": "hands it on",
    "rsm.workers.supervision.supervisor": "hands it on",
    "rsm.workers.supervision.node_jobs": "hands it on",
    "rsm.workers.backends.vllm.start.args": "vLLM's own variables and CUDA's",
    "rsm.workers.backends.vllm.start.gpus": "CUDA_VISIBLE_DEVICES, which a job scheduler sets",
    "rsm.workers.__main__": "a program",
    "rsm.cli.commands.processes": "a program",
    "rsm.cli.commands.calibrate": "a program; vLLM's own variable",
}


def test_settings_travel() -> None:
    """Nothing below a program reads the environment; a public class without settings takes them from there."""
    ours = {module: path.read_text() for module, path in modules().items() if module.startswith("rsm")}
    readers = {module for module, text in ours.items() if re.search(r"os\.(environ|getenv)", text)}
    assert readers == ENVIRONMENT.keys()
    makers = {
        module: line.strip()
        for module, text in ours.items()
        if not module.endswith("__main__")
        for line in text.splitlines()
        if re.search(r"\bSettings\(\)", line) and "settings or Settings()" not in line
    }
    assert makers.keys() <= {"rsm.broker.settings", "rsm.cli.app"}, makers


def test_every_script_is_a_transition_and_says_what_it_takes() -> None:
    for path in sorted((LUA / "transitions").glob("*.lua")):
        text = path.read_text()
        assert text.startswith("--- @include"), f"{path.name} does not say what it is made of"
        assert "-- ARGV" in text, f"{path.name} does not say what it takes"
        assert "Returns" in text, f"{path.name} does not say what it returns"
