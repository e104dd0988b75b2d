"""The Lua scripts as Redis gets them: no luacheck findings, spare locals, modules after those that they need."""

from __future__ import annotations

import re

import pytest

from rsm.broker.protocol.scripts import all_scripts, parts, script, source
from tests.support.lua import lint
from tests.support.lua.runtime import LOCALS, locals_left
from tests.support.paths import LUA

# So that the next change of a script still compiles.
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
    """The findings in scripts that all include one module."""
    made = lint.lint({name: [("shared", MODULE), (name, text)] for name, text in scripts.items()})
    return [(f.part, f.line, f.text) for f in made]


@pytest.mark.usefixtures("luacheck")
def test_luacheck_finds_nothing_in_the_scripts() -> None:
    assert [str(f) for f in lint.lint(SCRIPTS)] == []


@pytest.mark.usefixtures("luacheck")
def test_an_undefined_name_is_reported_with_its_line() -> None:
    """The script lacks the first line of a transition, which names its modules."""
    assert found(a="\nreturn used() + unused() + absent()\n") == [("a", 3, "accessing undefined variable 'absent'")]


@pytest.mark.usefixtures("luacheck")
@pytest.mark.parametrize("name", ["io", "os", "print", "require"])
def test_names_that_redis_does_not_have_are_undefined(name: str) -> None:
    assert found(a=f"return {{used(), unused(), {name}}}\n") == [("a", 2, f"accessing undefined variable '{name}'")]


@pytest.mark.usefixtures("luacheck")
def test_a_global_is_reported() -> None:
    assert found(a="total = used() + unused()\nreturn 1\n") == [
        ("a", 2, "setting non-standard global variable 'total'")
    ]


@pytest.mark.usefixtures("luacheck")
def test_a_local_that_hides_one_of_a_module_is_reported() -> None:
    ((part, line, text),) = found(a="local used = used() + unused()\nreturn used\n")
    assert (part, line) == ("a", 2)
    assert "previously defined" in text


@pytest.mark.usefixtures("luacheck")
def test_unused_locals_are_reported_in_a_script_but_in_a_module_only_if_no_script_uses_them() -> None:
    assert found(a="local n = used()\nreturn 1\n", b="return used() + unused()\n") == [("a", 2, "unused variable 'n'")]
    assert found(a="return used()\n", b="return used()\n") == [("shared", 2, "unused function 'unused'")]


def test_without_luacheck_a_warning_is_printed_and_ci_fails(
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
    assert locals_left("do local a, b end\nlocal c\nreturn c") == LOCALS - 2, "only locals that are active at once"
    assert locals_left(f"local {', '.join(f'a{n}' for n in range(LOCALS))}") == 0
    with pytest.raises(ValueError, match="does not compile"):
        locals_left("local 1")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_spare_locals(name: str) -> None:
    left = locals_left(script(name).text)
    assert left >= SPARE_LOCALS, f"{name}.lua has {left} of Lua's {LOCALS} locals left; use tables, or fewer modules"


# -- what a module needs


def needs(module: str) -> list[str]:
    """The modules that it uses, according to its first line."""
    head = re.match(r"--- @needs (.+)\n", source(module))
    assert head, f"{module}.lua does not begin with `--- @needs MODULE …`, or `--- @needs nothing`"
    return [] if head[1] == "nothing" else head[1].split()


def names_of(module: str) -> set[str]:
    """The names that it defines for later modules: its top-level locals."""
    declared = re.findall(r"^local (?:function )?(\w+(?:, \w+)*)", source(module), re.MULTILINE)
    return {name for names in declared for name in names.split(", ")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_includes_each_module_after_those_that_it_needs(name: str) -> None:
    before: list[str] = []
    for module, _ in SCRIPTS[name][:-1]:
        missing = set(needs(module)) - set(before)
        assert not missing, f"{name}.lua includes {module}, but not before it: {', '.join(missing)}"
        before.append(module)
    assert len(set(before)) == len(before), f"{name}.lua includes a module twice"


@pytest.mark.usefixtures("luacheck")
@pytest.mark.parametrize("module", MODULES)
def test_a_module_names_exactly_the_modules_that_it_needs(module: str) -> None:
    """They define all names that it does not define itself, and it uses each of them."""
    absent = [f.text for f in lint.lint({module: [(module, source(module))]}) if f.code == "W113"]
    used = {text.split("'")[1] for text in absent}
    origins = {name: [m for m in MODULES if name in names_of(m)] for name in used}
    assert {m for found in origins.values() for m in found} == set(needs(module)), origins
    assert all(origins.values()), f"no module defines {[n for n, found in origins.items() if not found]}"


def test_no_two_modules_define_the_same_name() -> None:
    """They share one scope, so the second would hide the first."""
    names = [(name, module) for module in MODULES for name in names_of(module)]
    assert len(dict(names)) == len(names)
