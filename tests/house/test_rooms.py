"""The architecture of docs/architecture.md: which room may import which, the size of folders, public names."""

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

# Each room, from the bottom up, with the rooms that it may import.
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
# Inside a room, a folder imports only folders before it.
LAYERS = {
    "rsm.broker": ("protocol", "connection", "client", "views"),
    "rsm.workers": ("meters", "scheduling", "backends", "runtime", "supervision"),
    "rsm.cli": ("demo", "commands"),
    "bench": ("report", "queue", "recovery", "programs", "vllm"),
}
MOST_FILES = 13
# Never imported with a module: a producer installs only the base.
HEAVY = {"lupa", "matplotlib", "vllm", "torch", "transformers", "httpx", "fastapi", "starlette", "uvicorn"}
# Packages of extras, with the modules that may import them.
ONLY_IN = {
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
    """Every module of this repository, by its dotted name."""
    found = {}
    for room in ROOMS:
        folder = ROOT / room.removeprefix("rsm.")
        for path in folder.glob("*.py") if room == "rsm" else folder.rglob("*.py"):
            parts = [*room.split("."), *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path, *, at_import: bool = False) -> frozenset[str]:
    """Dotted names that a file imports, also for types. `at_import` leaves out imports inside functions."""
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
    """The modules of this repository that a module imports."""
    known = modules()
    seen = (name if name in known else name.rpartition(".")[0] for name in imports(known[module]))
    return {name for name in seen if name in known} - {module}


def test_rooms_import_only_rooms_below_them() -> None:
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
        folder = module.removeprefix(f"{room}.").partition(".")[0]
        for other in arrows(module):
            imported = other.removeprefix(f"{room}.").partition(".")[0]
            above = folder in layers and imported in layers and layers.index(imported) > layers.index(folder)
            if room_of(other) == room and above:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_no_circular_imports() -> None:
    graph = {module: arrows(module) for module in modules()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as e:
        pytest.fail(f"a circle: {' -> '.join(e.args[1])}")


def test_no_folder_has_too_many_files() -> None:
    sizes = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert {str(f.relative_to(ROOT)): n for f, n in sizes.items() if n > MOST_FILES} == {}


def test_every_package_lists_its_public_names() -> None:
    """`__all__` of a package is its public surface. If it is empty, the package is internal."""
    for module, path in modules().items():
        if path.name == "__init__.py" and module.startswith("rsm"):
            found = import_module(module)
            names = found.__all__
            assert len(set(names)) == len(names), module
            assert [name for name in names if not hasattr(found, name)] == [], module


def test_examples_import_only_public_packages() -> None:
    for example in (ROOT / "examples").rglob("*.py"):
        imported = {name.rpartition(".")[0] for name in imports(example) if name.startswith("rsm")}
        assert imported <= {"rsm", "rsm.broker", "rsm.router", "rsm.workers", "rsm.engine"}, example


def test_nothing_heavy_is_imported_with_a_module() -> None:
    for module, path in modules().items():
        if not module.startswith("rsm"):
            continue
        roots = {name.partition(".")[0] for name in imports(path, at_import=True)}
        # Only vLLM's own child process imports the guard.
        assert not roots & HEAVY or path.name == "guard.py", f"{module} imports {roots & HEAVY}"
        for package, allowed in ONLY_IN.items():
            assert package not in roots or module.startswith(tuple(allowed)), f"{module} imports {package}"


# The modules that may read the environment, and why.
ENVIRONMENT = {
    "rsm.broker.settings": "the settings themselves, and folders",
    "rsm.broker.child_process": "passes it on",
    "rsm.workers.supervision.supervisor": "passes it on",
    "rsm.workers.supervision.node_jobs": "passes it on",
    "rsm.workers.backends.vllm.start.args": "vLLM's own variables and CUDA's",
    "rsm.workers.backends.vllm.start.gpus": "CUDA_VISIBLE_DEVICES, which a job scheduler sets",
    "rsm.workers.__main__": "a program",
    "rsm.cli.commands.processes": "a program",
    "rsm.cli.commands.calibrate": "a program; vLLM's own variable",
}


def test_settings_are_passed_down() -> None:
    """Only programs read the environment. Public classes read it if they get no settings."""
    sources = {module: path.read_text() for module, path in modules().items() if module.startswith("rsm")}
    readers = {module for module, text in sources.items() if re.search(r"os\.(environ|getenv)", text)}
    assert readers == ENVIRONMENT.keys()
    makers = {
        module: line.strip()
        for module, text in sources.items()
        if not module.endswith("__main__")
        for line in text.splitlines()
        if re.search(r"\bSettings\(\)", line) and "settings or Settings()" not in line
    }
    assert makers.keys() <= {"rsm.broker.settings", "rsm.cli.app"}, makers


def test_every_script_documents_its_arguments_and_its_reply() -> None:
    for path in sorted((LUA / "transitions").glob("*.lua")):
        text = path.read_text()
        assert text.startswith("--- @include"), f"{path.name} does not begin with its modules"
        assert "-- ARGV" in text, f"{path.name} does not document its arguments"
        assert "Returns" in text, f"{path.name} does not document what it returns"
