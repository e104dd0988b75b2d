"""Every state change is a script (docs/architecture.md, rule 1): no other code sends a write command."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.house.test_rooms import modules

WRITES = {
    "append", "copy", "decr", "decrby", "delete", "expire", "expireat", "flushall", "flushdb", "getdel", "getex",
    "getset", "hdel", "hexpire", "hincrby", "hincrbyfloat", "hmset", "hset", "hsetnx", "incr", "incrby", "lpush",
    "lrem", "lset", "ltrim", "mset", "persist", "pexpire", "pexpireat", "psetex", "publish", "rename", "restore",
    "rpush", "sadd", "setex", "setnx", "setrange", "srem", "unlink", "xack", "xadd", "xclaim", "xdel",
    "xgroup_create", "xgroup_delconsumer", "xgroup_destroy", "xgroup_setid", "xsetid", "xtrim", "zadd", "zincrby",
    "zpopmax", "zpopmin", "zrem", "zremrangebylex", "zremrangebyrank", "zremrangebyscore",
}  # fmt: skip
# Writes to what no other process writes, by (module, command).
ALLOWED = {
    ("rsm.broker.client.inbox", "xadd"): "a client's own inbox",
    ("rsm.broker.client.inbox", "pexpire"): "a client's own inbox",
    ("rsm.broker.client.inbox", "xtrim"): "a client's own inbox",
    ("rsm.broker.client.sync", "pexpire"): "a client's own inbox",
    ("rsm.broker.client.aio", "pexpire"): "a client's own inbox",
    ("rsm.broker.client.aio", "xtrim"): "a client's own inbox",
    ("rsm.router.router", "xgroup_create"): "Redis creates a group only once",
    ("rsm.workers.supervision.orders", "set"): "the lease of an order, which only its sender writes",
    ("rsm.workers.supervision.orders", "delete"): "the lease of an order, which only its sender writes",
    ("rsm.workers.supervision.node", "delete"): "RQ's own job",
    ("rsm.workers.supervision.node", "hset"): "RQ's own registration of a node",
    ("rsm.workers.supervision.node", "restore"): "RQ's own method, which reads",
}
# Methods of other objects than Redis: collections, files, RQ's objects.
_OTHERS = {"append", "copy", "publish", "persist", "rename", "unlink", "expire"}


def writes(source: str) -> Iterator[str]:
    """Write commands that a source sends: by method, or by name through `execute_command`."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name = node.func.attr
        first = node.args[0] if node.args else None
        if name in ("execute_command", "exchange", "send") and isinstance(first, ast.Constant):
            name = str(first.value).lower().replace(" ", "_")
            if name in WRITES:
                yield name
        elif name in WRITES - _OTHERS or (name == "set" and len(node.args) > 1):
            yield name


def test_no_write_bypasses_the_scripts() -> None:
    package = {m: p for m, p in modules().items() if m.startswith("rsm")}
    found = {(module, name) for module, path in package.items() for name in writes(path.read_text())}
    assert found == ALLOWED.keys()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("self._redis.hset(key, mapping=fields)", ["hset"]),
        ("pipe.hset(k, 'f', 1).expire(k, 3)", ["hset"]),
        ("line.execute_command('XTRIM', key, 'MINID', last)", ["xtrim"]),
        ("server.set(key, 1, ex=3); stopped.set()", ["set"]),
        ("server.hget(key, 'f'); names.append(1); path.unlink()", []),
    ],
)
def test_the_search_finds_what_it_looks_for(source: str, found: list[str]) -> None:
    assert list(writes(source)) == found
