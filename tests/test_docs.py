"""What the docs name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def _names(page: Path, pattern: str) -> set[str]:
    return set(re.findall(pattern, page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    missing = {name for name in _names(page, r"\btest_\w+\.py") if not (ROOT / "tests" / name).is_file()}
    assert not missing
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    functions = _names(page, r"`(test_\w+)`")
    assert {name for name in functions if f"def {name}(" not in code} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = _names(page, r"\]\(([^)#:]+)(?:#[^)]*)?\)")
    assert {link for link in links if not (page.parent / link).exists()} == set()


def test_conformance_names_tests() -> None:
    promises = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8").partition("## Not promised")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 20
    assert [row for row in rows if "test_" not in row and "python -m bench" not in row and "make " not in row] == []
