"""The Lua scripts as Redis gets them: nothing that luacheck knows, locals to spare, modules behind what they need."""

from __future__ import annotations

import re

import pytest

from rsm.broker.protocol.scripts import all_scripts, parts, script, source
from tests.support.lua import lint
from tests.support.lua.runtime import LOCALS, locals_left
from tests.support.paths import LUA

# The next change of a script must not be the one that does not compile.
SPARE_LOCALS = 5

MODULE = "local function used() return 1 end\nlocal function unused() return 2 end\n"
SCRIPTS = {script.name: parts(script.name) for script in all_scripts()}
MODULES = sorted(path.stem for path in LUA.glob("modules/*.lua"))


@pytest.fixture
def luacheck() -> None:
    if not lint.is_here() and not lint.is_required():
        pytest.skip(lint.ADVICE)
    assert lint.is_here(), f"{lint.REQUIRE}=1, and {lint.ADVICE}"


def found(**scripts: str) -> list[tuple[str, int, str]]:
    """What the lint says of scripts that all have one module."""
    made = lint.lint({name: [("shared", MODULE), (name, text)] for name, text in scripts.items()})
    return [(f.part, f.line, f.text) for f in made]


@pytest.mark.usefixtures("luacheck")
def test_luacheck_finds_nothing_in_the_scripts() -> None:
    assert [str(f) for f in lint.lint(SCRIPTS)] == []


@pytest.mark.usefixtures("luacheck")
def test_a_name_that_is_not_there_is_found_where_it_stands() -> None:
    """A transition's first line, which names its modules, is none of the script's."""
    assert found(a="\nreturn used() + unused() + absent()\n") == [("a", 3, "accessing undefined variable 'absent'")]


@pytest.mark.usefixtures("luacheck")
@pytest.mark.parametrize("name", ["io", "os", "print", "require"])
def test_what_redis_does_not_have_is_a_name_that_is_not_there(name: str) -> None:
    assert found(a=f"return {{used(), unused(), {name}}}\n") == [("a", 2, f"accessing undefined variable '{name}'")]


@pytest.mark.usefixtures("luacheck")
def test_a_script_that_sets_a_global_is_found() -> None:
    assert found(a="total = used() + unused()\nreturn 1\n") == [
        ("a", 2, "setting non-standard global variable 'total'")
    ]


@pytest.mark.usefixtures("luacheck")
def test_a_local_that_hides_one_of_a_module_is_found() -> None:
    ((part, line, text),) = found(a="local used = used() + unused()\nreturn used\n")
    assert (part, line) == ("a", 2)
    assert "previously defined" in text


@pytest.mark.usefixtures("luacheck")
def test_a_script_uses_all_its_own_locals_and_of_a_module_what_it_needs() -> None:
    assert found(a="local n = used()\nreturn 1\n", b="return used() + unused()\n") == [("a", 2, "unused variable 'n'")]
    assert found(a="return used()\n", b="return used()\n") == [("shared", 2, "unused function 'unused'")]


def test_without_luacheck_one_line_says_so_and_ci_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lint, "is_here", lambda: False)
    monkeypatch.delenv(lint.REQUIRE, raising=False)
    assert lint.main() == 0
    monkeypatch.setenv(lint.REQUIRE, "1")
    assert lint.main() == 1
    assert capsys.readouterr().err.splitlines() == [f"{lint.ADVICE}; the Lua scripts were not linted."] * 2


def test_locals_are_counted_as_lua_counts_them() -> None:
    assert locals_left("return 1") == LOCALS
    assert locals_left("local a, b\nlocal function c() local d, e, f end\nreturn a") == LOCALS - 3
    assert locals_left("do local a, b end\nlocal c\nreturn c") == LOCALS - 2, "only those that live at once"
    assert locals_left(f"local {', '.join(f'a{n}' for n in range(LOCALS))}") == 0
    with pytest.raises(ValueError, match="does not compile"):
        locals_left("local 1")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_locals_left(name: str) -> None:
    left = locals_left(script(name).text)
    assert left >= SPARE_LOCALS, f"{name}.lua has {left} of Lua's {LOCALS} locals left; use tables, or fewer modules"


# -- what a module needs


def needs(module: str) -> list[str]:
    """The modules of which it uses something, as its first line says."""
    head = re.match(r"--- @needs (.+)\n", source(module))
    assert head, f"{module}.lua does not begin with `--- @needs MODULE …`, or `--- @needs nothing`"
    return [] if head[1] == "nothing" else head[1].split()


def names_of(module: str) -> set[str]:
    """What it gives to those behind it: its outermost locals."""
    declared = re.findall(r"^local (?:function )?(\w+(?:, \w+)*)", source(module), re.MULTILINE)
    return {name for names in declared for name in names.split(", ")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_each_module_behind_those_that_it_needs(name: str) -> None:
    before: list[str] = []
    for module, _ in SCRIPTS[name][:-1]:
        missing = set(needs(module)) - set(before)
        assert not missing, f"{name}.lua includes {module}, and not before it what that needs: {', '.join(missing)}"
        before.append(module)
    assert len(set(before)) == len(before), f"{name}.lua includes a module twice"


@pytest.mark.usefixtures("luacheck")
@pytest.mark.parametrize("module", MODULES)
def test_a_module_names_just_what_it_needs(module: str) -> None:
    """Each name that it does not define is one of those modules', and of each of them it uses something."""
    absent = [f.text for f in lint.lint({module: [(module, source(module))]}) if f.code == "W113"]
    used = {text.split("'")[1] for text in absent}
    origins = {name: [m for m in MODULES if name in names_of(m)] for name in used}
    assert {m for found in origins.values() for m in found} == set(needs(module)), origins
    assert all(origins.values()), f"nobody defines {[n for n, found in origins.items() if not found]}"


def test_no_two_modules_use_one_name() -> None:
    """They share one scope: the second would hide the first."""
    names = [(name, module) for module in MODULES for name in names_of(module)]
    assert len(dict(names)) == len(names)
