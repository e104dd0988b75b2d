"""Ids cannot leave their key space: no accepted id names a key of another kind, of another id or namespace."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.leaks import LASTING
from rsm.broker import InvalidRequest, Settings
from rsm.broker.protocol.ids import MODEL_PATTERN, RESERVED_ENDS, is_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.scripts import script
from rsm.workers.supervision.node import queue_name
from tests.support.paths import LUA

KINDS: dict[str, Callable[[Keys, str], str]] = {
    "call": Keys.call,
    "events": Keys.events,
    "inbox": Keys.inbox,
    "engine": Keys.engine,
    "queue": Keys.queue,
    "work": Keys.work,
    "starving": Keys.starving,
    "residents": Keys.residents,
    "running": Keys.running,
    "bell": Keys.bell,
    "control": Keys.control,
    "order": Keys.order,
    "session": Keys.session,
    "session_calls": Keys.session_calls,
    "session_children": Keys.session_children,
    "session_recent": Keys.session_recent,
    "affinity": Keys.affinity,
    "residency": Keys.residency,
    "parked": Keys.parked,
    "held": Keys.held,
    "held_starving": Keys.held_starving,
}
# Keys that no script uses.
NOT_IN_LUA = {"order"}
FIXED = tuple(name for name, member in vars(Keys).items() if isinstance(member, property) and name != "prefix")

# Made of the parts of keys, to make collisions likely.
_parts = st.sampled_from(
    [
        "a",
        "b",
        ":",
        "::",
        ".",
        "-",
        "call",
        "calls",
        "session",
        "engine",
        "order",
        "parked",
        "held",
        "starving",
        "residency",
        "recent",
        *RESERVED_ENDS,
        "rsm",
        "1-0",
    ]
)
ids = st.lists(_parts, min_size=1, max_size=5).map("".join).filter(is_id)
namespaces = ids
models = st.lists(_parts | st.sampled_from("/@+="), max_size=5).map("".join)
relaxed = settings(deadline=None, database=None, max_examples=400)


def names_of(keys: Keys, value: str) -> dict[tuple[str, str], str]:
    return {(kind, value): make(keys, value) for kind, make in KINDS.items()}


@relaxed
@given(namespaces, namespaces, ids, ids)
def test_no_two_things_share_a_key(here: str, there: str, one: str, other: str) -> None:
    found: dict[str, tuple[str, str, str]] = {}
    for ns, value in itertools.product({here, there}, {one, other}):
        keys = Keys(ns)
        fixed = {("fixed", name): getattr(keys, name) for name in FIXED}
        for (kind, name), key in {**names_of(keys, value), **fixed}.items():
            assert found.setdefault(key, (ns, kind, name)) == (ns, kind, name), key
            assert key.startswith(f"{{{ns}}}:")


@relaxed
@given(models.filter(lambda m: not m or bool(MODEL_PATTERN.fullmatch(m))), ids)
@pytest.mark.parametrize("kind", ["parked", "held", "held_starving"])
def test_a_models_name_stays_among_those_of_models(kind: str, model: str, value: str) -> None:
    keys = Keys()
    others = {key for (other, _), key in names_of(keys, value).items() if other != kind}
    assert KINDS[kind](keys, model) not in others | {getattr(keys, name) for name in FIXED}


@settings(relaxed, max_examples=60)
@given(namespaces, ids, namespaces, ids)
def test_no_two_hosts_share_a_queue(ns: str, node: str, other_ns: str, other: str) -> None:
    same = queue_name(Settings(namespace=ns), node) == queue_name(Settings(namespace=other_ns), other)
    assert same is ((ns, node) == (other_ns, other))


@pytest.mark.parametrize(
    "value", ["a b", "a\n", "a}", "{a", "a*", "a?", "a[b]", "é", "a/b", "", "x" * 129, "a\x00", "a\\"]
)
def test_what_could_leave_is_no_id(value: str) -> None:
    assert not is_id(value)
    with pytest.raises(InvalidRequest):
        Keys(value)


def test_lua_builds_the_same_names() -> None:
    """Each key function of lib.lua, read as a pattern, equals a method of Keys."""
    text = script("snapshot").text
    made = re.findall(
        r"local function (\w+)_key\(\w+\) return P \.\. '([a-z]+:)' \.\. \w+(?: \.\. '(:[a-z]+)')? end", text
    )
    lua = {f"{head}x{tail}" for _, head, tail in made}
    assert lua == {make(Keys("n"), "x").removeprefix("{n}:") for kind, make in KINDS.items() if kind not in NOT_IN_LUA}
    fixed = set(re.findall(r"P \.\. '([a-z:]+)'(?! \.\.)", "".join(p.read_text() for p in LUA.glob("*/*.lua"))))
    assert fixed == {getattr(Keys("n"), name).removeprefix("{n}:") for name in FIXED}


def test_the_leak_check_ignores_no_key_of_an_id() -> None:
    """The leak check of these tests must not mistake a call's record for a key that may stay."""
    assert not any(LASTING.fullmatch(make(Keys("n"), "x").removeprefix("{n}:")) for make in (Keys.call, Keys.events))
