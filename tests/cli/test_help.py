"""`--help`: every command is in its group, explains each option, and fits 80 columns."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer

from rsm.cli import app
from rsm.cli.groups import GROUPS, SERVING, group_of, in_order
from tests.support.rsm_command import RSM, clean_env, run, typed

ROOT: Any = typer.main.get_command(app)


def test_every_command_is_in_one_group() -> None:
    grouped = [command for commands in GROUPS.values() for command in commands]
    assert sorted(grouped) == sorted(ROOT.commands)
    assert set(SERVING) <= set(grouped)


def test_a_command_without_a_group_comes_last() -> None:
    assert in_order(["new", "acl", "up"]) == ["up", "acl", "new"]
    assert group_of("new") is None


def test_help_shows_the_groups_in_order() -> None:
    shown = typed([RSM, "--help"], clean_env())
    assert max(map(len, shown.splitlines())) <= 80
    panels = re.findall(r"^╭─ (.+?) ─", shown, re.MULTILINE)
    assert panels == ["Options", *GROUPS]
    rows = re.findall(r"^│ ([a-z-]+) ", shown, re.MULTILINE)
    assert [row for row in rows if not row.startswith("-")] == [c for commands in GROUPS.values() for c in commands]


def pages() -> dict[str, Any]:
    found = {}
    for name, command in ROOT.commands.items():
        found[name] = command
        found |= {f"{name} {below}": c for below, c in getattr(command, "commands", {}).items()}
    return found


@pytest.mark.parametrize("name", pages())
def test_a_page_explains_the_command_and_each_option(name: str) -> None:
    command = pages()[name]
    assert command.help
    assert command.help.partition(".")[0].split()[0].endswith("s"), "it begins with what the command does"
    for option in (p for p in command.params if p.param_type_name == "option"):
        assert option.help, f"rsm {name} {option.opts[0]}"
        assert option.help.endswith("."), f"rsm {name} {option.opts[0]}"
        assert "none =" not in option.help, f"rsm {name} {option.opts[0]}"


@pytest.mark.parametrize("name", ["submit", "dead replay", "engines", "up"])
def test_a_page_fits_80_columns(name: str) -> None:
    shown = typed([RSM, *name.split(), "--help"], clean_env())
    assert max(map(len, shown.splitlines())) <= 80


def test_a_page_has_whole_paragraphs() -> None:
    """They are wrapped by the width of the terminal, and not where the source has a line break."""
    shown = typed([RSM, "up", "--help"], clean_env(), columns=200)
    (paragraph,) = [line.strip() for line in shown.splitlines() if "Ctrl-C" in line]
    assert paragraph.startswith("Ctrl-C lets running calls finish")
    assert paragraph.endswith("when engines are back.")


def test_version_and_a_typing_error() -> None:
    assert run("--version").stdout.startswith("rsm-engine ")
    wrong = run("enginse")
    assert wrong.returncode == 2
    assert "engines" in wrong.stderr
