"""deploy/Dockerfile without Docker: what it says, and its first stage's own lines run in a folder."""

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
    """What stands between one FROM and the next: words such as COPY, each with the rest of its line."""

    base: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def said(self, word: str) -> list[str]:
        return [rest for name, rest in self.lines if name == word]

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """What ARG and ENV set. `given` holds what is there before, such as PATH."""
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
    """Whole lines without comments; those that a backslash continues are one."""
    said = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(said).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        yield word.upper(), rest.strip()


# -- the context: what `docker build` may copy


def context(root: Path) -> list[Path]:
    """Files and links of a folder, relative to it, that its .dockerignore leaves."""
    patterns = [line.strip() for line in (root / ".dockerignore").read_text().splitlines()]
    rules = [_rule(p) for p in patterns if p and not p.startswith("#")]
    return [path for path in _files(root) if not _ignored(path, rules)]


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        yield from ((here / name).relative_to(root) for name in [*files, *links])


def _rule(pattern: str) -> tuple[re.Pattern[str], bool]:
    """By Docker's rules: `**` is any folders, `*` no slash, `!` lets in again."""
    keep = pattern.startswith("!")
    glob = re.escape(pattern.removeprefix("!").strip("/"))
    for escaped, meant in ((r"\*\*/", "(?:.*/)?"), (r"\*\*", ".*"), (r"\*", "[^/]*"), (r"\?", "[^/]")):
        glob = glob.replace(escaped, meant)
    return re.compile(re.sub(r"\\\[(.*?)\\\]", r"[\1]", glob)), not keep


def _ignored(path: Path, rules: list[tuple[re.Pattern[str], bool]]) -> bool:
    """The last rule that matches the path, or a folder that it is in, says."""
    names = [str(p) for p in (path, *path.parents)]
    said = [ignore for regex, ignore in rules if any(regex.fullmatch(name) for name in names)]
    return bool(said) and said[-1]


# -- the first stage


def build(root: Path, folder: Path, **args: str) -> None:
    """Runs the COPY and RUN lines of the first stage, with this machine's Python and `folder`/src as the work folder.

    Args:
        args: instead of the values that ARG lines give, such as VENV.
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
    assert found, f"COPY {source}: .dockerignore leaves nothing of it"
    for path in found:
        target = to / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, target, follow_symlinks=False)
