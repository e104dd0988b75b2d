"""Names in the docs exist, and tables in the docs are complete."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from rsm.broker import ErrorCode, Settings
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.models import CallRequest
from tests.protocol.test_spec import MUTANTS
from tests.support.paths import LUA, ROOT

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def _names(page: Path, pattern: str) -> set[str]:
    return set(re.findall(pattern, page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_tests_exist(page: Path) -> None:
    files = {path.name for path in TESTS}
    assert _names(page, r"\btest_\w+\.py") - files == set()
    code = "\n".join(path.read_text(encoding="utf-8") for path in TESTS)
    functions = _names(page, r"`(test_\w+)`")
    assert {name for name in functions if f"def {name}(" not in code} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_are_not_broken(page: Path) -> None:
    links = _names(page, r"\]\(([^)#:]+)(?:#[^)]*)?\)")
    assert {link for link in links if not (page.parent / link).exists()} == set()


def test_the_chaos_checks_that_are_named_exist() -> None:
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if "`test_chaos.py`" in row]
    named = [name for row in rows for name in re.findall(r"\*([a-z ]+)\*", row)]
    assert len(named) > 10
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "chaos").glob("*.py"))
    assert [n for n in named if f'"{n}"' not in code and f"def _{n.replace(' ', '_')}(" not in code] == []


def test_the_mutants_of_the_model_are_explained() -> None:
    page = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"`([A-Z_]{2,})`", page)) == sorted(MUTANTS)


def test_conformance_names_a_test_for_each_promise() -> None:
    promises = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8").partition("## Not promised")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 20
    assert [row for row in rows if "test_" not in row and "python -m bench" not in row and "make " not in row] == []


@pytest.mark.parametrize("folder", ["broker", "router", "workers", "simulation", "engine", "cli", "chaos", "spec"])
def test_the_architecture_names_every_file(folder: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.name for suffix in ("py", "pml") for path in (ROOT / folder).rglob(f"*.{suffix}")}
    assert {name for name in files if not name.startswith("__") and name not in page} == set()


def _rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without the header row."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]


_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _default(cell: str) -> str:
    """A default value. A size is converted to bytes."""
    number, _, unit = cell.partition(" ")
    return str(int(number) * _UNITS[unit]) if unit in _UNITS else cell.strip("`")


def test_the_table_of_settings_is_complete_and_right() -> None:
    documented = {
        name: _default(default)
        for names, defaults, *_ in _rows("operations.md", "Settings")
        for name, default in zip(names.strip("`").split("`, `"), defaults.split(", "), strict=True)
    }
    fields = Settings.model_fields
    assert documented.keys() == {f"RSM_{name.upper()}" for name in fields}
    for name, field in fields.items():
        default = field.default
        expected = " ".join(map(str, default)) if isinstance(default, tuple) else default
        if expected is not None:  # else the table describes the default in words
            shown = documented[f"RSM_{name.upper()}"]
            assert shown == str(expected) or float(shown) == expected, name


def test_the_table_of_keys_is_complete() -> None:
    keys = Keys("n")
    names = {
        "call_id": "ID",
        "client_id": "CLIENT",
        "engine_id": "E",
        "job_id": "JOB",
        "session_id": "SESSION",
        "model": "MODEL",
    }
    made = set()
    for name, member in vars(Keys).items():
        if isinstance(member, property) and name != "prefix":
            made.add(getattr(keys, name))
        elif inspect.isfunction(member) and not name.startswith("_"):
            (parameter,) = list(inspect.signature(member).parameters)[1:]
            made.add(member(keys, names[parameter]))
    documented = {f"{keys.prefix}{row[0].strip('`')}" for row in _rows("protocol.md", "Keys")}
    assert documented - {f"{keys.prefix}rq:*"} == made


def test_the_table_of_a_push_is_complete() -> None:
    named = [name for row in _rows("protocol.md", "Pushing a call") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted([*CallRequest.model_fields, "json", "body", "timeout_ms"])


def test_every_script_is_named() -> None:
    named = [name for row in _rows("protocol.md", "Transitions") for name in re.findall(r"`(\w+)`", row[1])]
    assert sorted(named) == sorted(path.stem for path in (LUA / "transitions").glob("*.lua"))


def test_every_error_code_is_documented() -> None:
    assert {row[0].strip("`") for row in _rows("protocol.md", "States")} == set(ErrorCode)


def test_every_field_of_a_record_is_documented() -> None:
    """All fields that scripts write into a record."""
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"\w+", page.partition("\n## The record\n")[2].partition("`.")[0]))
    written = set()
    for path in LUA.glob("*/*.lua"):
        lua = path.read_text(encoding="utf-8")
        target = (
            r"call_key\(id\)" if "key = engine_key" in lua or "key = session_key" in lua else r"(?:call_key\(id\)|key)"
        )
        for arguments in re.findall(rf"'HSET', {target},(.*)|set_fields\({target}, {{([^}}]*)}}", lua):
            written |= set(re.findall(r"'([a-z_]+)',", "".join(arguments)))
    assert {"state", "why", "deaths", "finished_ms"} <= written
    assert written - {"format"} <= documented
