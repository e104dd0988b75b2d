"""Runs luacheck on every script as Redis gets it, with its modules. Findings name the source file and its line.

A script need not use all of a module. So an unused local of a module is reported only if no script uses it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from rsm.broker.protocol.scripts import all_scripts, parts
from tests.support.lua.runtime import locals_left
from tests.support.paths import LUA, ROOT

REQUIRE = "RSM_TEST_REQUIRE_LUACHECK"
ADVICE = "luacheck is not installed (Debian: apt-get install lua-check)"
_CONFIG = ROOT / ".luacheckrc"
_FOUND = re.compile(r"(?P<script>\w+)\.lua:(?P<line>\d+):(?P<column>\d+): \((?P<code>[EW]\d+)\) (?P<text>.+)")
_UNUSED = "W2"

Parts = list[tuple[str, str]]


class Finding(NamedTuple):
    """`part`: the module or the transition; `line`: the line in its file."""

    part: str
    line: int
    column: int
    code: str
    text: str

    def __str__(self) -> str:
        return f"{_path(self.part)}:{self.line}:{self.column}: ({self.code}) {self.text}"


def is_here() -> bool:
    return shutil.which("luacheck") is not None


def is_required() -> bool:
    return os.environ.get(REQUIRE) == "1"


def lint(scripts: Mapping[str, Parts]) -> list[Finding]:
    """What luacheck finds in scripts. `scripts`: the parts of each script, by name."""
    with tempfile.TemporaryDirectory() as folder:
        for name, made_of in scripts.items():
            (Path(folder) / f"{name}.lua").write_text("\n".join(text for _, text in made_of), encoding="utf-8")
        command = ["luacheck", "--config", str(_CONFIG), "--no-cache", "--formatter", "plain", "--codes", "."]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode > 2:  # 1 and 2: it found something
        raise RuntimeError(f"luacheck failed: {done.stdout}{done.stderr}")
    return sorted(_relevant(scripts, done.stdout.splitlines()))


def _relevant(scripts: Mapping[str, Parts], lines: Iterable[str]) -> list[Finding]:
    seen = Counter(_finding(line, scripts) for line in lines if line.strip())
    uses = Counter(name for made_of in scripts.values() for name, _ in made_of)
    return [f for f, times in seen.items() if not f.code.startswith(_UNUSED) or times == uses[f.part]]


def _finding(shown: str, scripts: Mapping[str, Parts]) -> Finding:
    found = _FOUND.search(shown)
    if found is None:
        raise RuntimeError(f"luacheck printed an unknown line: {shown}")
    part, line = _origin(scripts[found["script"]], int(found["line"]))
    # Other line numbers in the text are those of the whole script.
    text = re.sub(r" on line \d+", "", found["text"])
    return Finding(part, line, int(found["column"]), found["code"], text)


def _origin(made_of: Parts, line: int) -> tuple[str, int]:
    """The part that a line of a script belongs to, and its line in that part's file."""
    for name, text in made_of:
        size = text.count("\n") + 1
        if line <= size:
            return name, line + (name == made_of[-1][0])  # the script lacks the first line of its transition
        line -= size
    raise ValueError(f"line {line} is beyond the end")


def _path(part: str) -> str:
    found = next(LUA.glob(f"*/{part}.lua"), None)
    return str(found.relative_to(ROOT)) if found else part


def main() -> int:
    if not is_here():
        print(f"{ADVICE}; the Lua scripts were not linted.", file=sys.stderr)
        return 1 if is_required() else 0
    found = lint({s.name: parts(s.name) for s in all_scripts()})
    for finding in found:
        print(finding)
    left = sorted((locals_left(s.text), s.name) for s in all_scripts())
    fewest = ", ".join(f"{name} {n}" for n, name in left[:5])
    print(f"{len(left)} Lua scripts, {len(found)} findings; fewest spare locals: {fewest}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
