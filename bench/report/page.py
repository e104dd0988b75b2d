"""Pages of results, and their sections in the docs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.table import table_line

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs" / "scheduling.md"


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the table of targets."""

    what: str
    aim: str
    got: str
    met: bool

    def cells(self) -> tuple[str, ...]:
        return self.what, self.aim, self.got, "yes" if self.met else "**no**"


@dataclass(frozen=True, slots=True)
class Report:
    """A benchmark's results. `section` also goes into docs/scheduling.md, `more` does not; `data` has all figures."""

    title: str
    about: Mapping[str, str]
    section: Sequence[str]
    data: Mapping[str, Any]
    command: str
    more: Sequence[str] = ()

    def page(self) -> str:
        lines = [f"# {self.title}: {self.about['Machine']}", ""]
        lines += [f"- {key}: {value}" for key, value in self.about.items() if key != "Machine"]
        return "\n".join(
            [*lines, "", *self.section, *([""] if self.more else []), *self.more, "", f"Made by `{self.command}`.", ""]
        )


def targets_table(found: Iterable[Target]) -> list[str]:
    return [
        table_line(("What", "Target", "Measured", "Met")),
        table_line(["---", "---", "---:", "---"]),
        *(table_line(t.cells()) for t in found),
    ]


def into_docs(mark: str, section: Sequence[str], docs: Path = DOCS) -> bool:
    """Replaces the lines between <!-- MARK --> and <!-- /MARK --> of a document; False if it has no such marks."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    text = docs.read_text(encoding="utf-8") if docs.exists() else ""
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        print(f"{docs.name} is unchanged, because it has no {begin} … {end}")
        return False
    docs.write_text("\n".join([head + begin, "", *section, "", end + tail]), encoding="utf-8")
    return True


def publish(report: Report, name: str, folder: Path = RESULTS, docs: Path = DOCS) -> None:
    """Writes NAME.md and NAME.json, prints the page, and puts its section between the docs' marks of that name."""
    text = report.page()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    data = {"machine": report.about, **report.data}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print(text)
    into_docs(name.replace("_", "-"), report.section, docs)


def write(name: str, text: str, data: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Writes NAME.md and NAME.json, and prints the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print(text)
