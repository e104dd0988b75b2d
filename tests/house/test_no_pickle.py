"""No code unpickles or evaluates data, or imports a module that could."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "jsonpickle"}
_OF_RQ = {"Queue", "Worker", "NodeWorker"}
_CALLS = {"eval", "exec", "compile", "__import__"}
_FILES = sorted(
    path for room in ("broker", "router", "workers", "engine", "bench") for path in (ROOT / room).rglob("*.py")
)


def dangers(source: str) -> Iterator[str]:
    """Imports and calls that could turn data into code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in _MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _MODULES:
            yield node.module or ""
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            yield node.func.id
        elif isinstance(node, ast.Call) and any(k.arg == "allow_pickle" for k in node.keywords):
            yield "allow_pickle"


@pytest.mark.parametrize("path", _FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_can_unpickle_or_evaluate(path: Path) -> None:
    assert list(dangers(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("def f():\n    from pickle import loads", ["pickle"]),
        ("import yaml.loader", ["yaml.loader"]),
        ("eval(x)", ["eval"]),
        ("numpy.load(x, allow_pickle=True)", ["allow_pickle"]),
        ("re.compile(x); self.exec()", []),
    ],
)
def test_the_search_finds_what_it_looks_for(source: str, found: list[str]) -> None:
    assert list(dangers(source)) == found


def test_rq_always_uses_json() -> None:
    """RQ's default serializer is pickle. Each queue and each worker must name another one."""
    checked = 0
    for path in (p for p in _FILES if p.relative_to(ROOT).parts[0] != "bench"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _OF_RQ:
                if any(isinstance(a, ast.Name) and a.id == "SimpleQueue" for a in node.args):
                    continue
                names = {k.arg: getattr(k.value, "id", "") for k in node.keywords}
                if "connection" in names:
                    assert names.get("serializer") == "JSONSerializer", f"{path}:{node.lineno}"
                    checked += 1
    assert checked >= 3
