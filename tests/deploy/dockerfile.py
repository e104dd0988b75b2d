"""deploy/Dockerfile without Docker: parses it, and runs the lines of its first stage in a folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from tests.deploy.installs import fresh_env


@dataclass(frozen=True, slots=True)
class Stage:
    """The instructions from one FROM to the next: a word such as COPY, and the rest of its line."""

    base: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def said(self, word: str) -> list[str]:
        """The arguments of all instructions with this word."""
        return [rest for name, rest in self.lines if name == word]

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """The variables that ARG and ENV set, added to those of `given`, such as PATH."""
        found = dict(given)
        for name, rest in self.lines:
            if name in ("ARG", "ENV"):
                for variable, quoted, plain in re.findall(r'(\w+)=(?:"([^"]*)"|(\S*))', rest):
                    found[variable] = Template(quoted or plain).safe_substitute(found)
        return found


def stages(path: Path) -> list[Stage]:
    found: list[Stage] = []
    for word, rest in _lines(path):
        if word == "FROM":
            found.append(Stage(rest))
        elif found:
            found[-1].lines.append((word, rest))
    return found


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Instructions without comments. Lines that a backslash continues are joined."""
    kept = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(kept).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        yield word.upper(), rest.strip()


# -- the context: what `docker build` may copy


def context(root: Path) -> list[Path]:
    """Files and links of a folder that its .dockerignore does not exclude, relative to the folder."""
    patterns = [line.strip() for line in (root / ".dockerignore").read_text().splitlines()]
    rules = [_rule(p) for p in patterns if p and not p.startswith("#")]
    return [path for path in _files(root) if not _ignored(path, rules)]


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        yield from ((here / name).relative_to(root) for name in [*files, *links])


def _rule(pattern: str) -> tuple[re.Pattern[str], bool]:
    """A regex, and whether it excludes. In Docker's rules, `**` is any folders, `*` has no slash, `!` re-includes."""
    keep = pattern.startswith("!")
    glob = re.escape(pattern.removeprefix("!").strip("/"))
    for escaped, meant in ((r"\*\*/", "(?:.*/)?"), (r"\*\*", ".*"), (r"\*", "[^/]*"), (r"\?", "[^/]")):
        glob = glob.replace(escaped, meant)
    return re.compile(re.sub(r"\\\[(.*?)\\\]", r"[\1]", glob)), not keep


def _ignored(path: Path, rules: list[tuple[re.Pattern[str], bool]]) -> bool:
    """Whether a path is excluded: the last rule that matches it, or a folder above it, decides."""
    names = [str(p) for p in (path, *path.parents)]
    matched = [ignore for regex, ignore in rules if any(regex.fullmatch(name) for name in names)]
    return bool(matched) and matched[-1]


# -- the first stage


def build(root: Path, folder: Path, **args: str) -> None:
    """Runs the COPY and RUN lines of the first stage, with this machine's Python and `folder`/src as the work folder.

    Args:
        args: replace the values of ARG lines, such as VENV.
    """
    stage = stages(root / "deploy" / "Dockerfile")[0]
    work = folder / "src"
    work.mkdir()
    here = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = stage.environment(fresh_env(PATH=here)) | args
    for word, rest in stage.lines:
        if word == "COPY":
            *sources, to = rest.split()
            for source in sources:
                _copy(root, source, work / to)
        elif word == "RUN":
            done = subprocess.run(
                ["/bin/sh", "-c", rest], cwd=work, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"RUN {rest}\n{done.stdout}\n{done.stderr}"


def _copy(root: Path, source: str, to: Path) -> None:
    found = [path for path in context(root) if path.is_relative_to(source)]
    assert found, f"COPY {source}: .dockerignore excludes all of it"
    for path in found:
        target = to / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, target, follow_symlinks=False)
