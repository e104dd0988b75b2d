"""Redis users for the processes, as lines of an ACL file. Each has only the permissions that its process needs.

Redis checks the commands of a script with the permissions of the user that runs it. So a permission is a command with
the keys that it may touch. An ACL cannot protect the users of one namespace from each other: a producer that may write
call records may write all of them, and a user that may read a record may read all its fields, including the body.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rsm.broker.protocol.keys import Keys

# Not the hash of any known password: until it is replaced, the user cannot log in.
LOCKED = "0" * 64


@dataclass(frozen=True, slots=True)
class Grant:
    """Commands, the keys that they may read or write (globs after the namespace's prefix), and channels."""

    commands: str
    read: str = ""
    write: str = ""
    channels: str = ""

    def rules(self, prefix: str) -> list[str]:
        """In Redis's syntax. A key that is both read and written needs one rule."""
        read, write = self.read.split(), self.write.split()
        both = [f"~{_key(prefix, key)}" for key in read if key in write]
        return [
            *(f"+{command}" for command in self.commands.split()),
            *both,
            *(f"%R~{_key(prefix, key)}" for key in read if key not in write),
            *(f"%W~{_key(prefix, key)}" for key in write if key not in read),
            *(f"&{channel}" for channel in self.channels.split()),
        ]


def _key(prefix: str, key: str) -> str:
    """`.` is the bare prefix, the key argument of every script; `rq:` is RQ's own key space."""
    if key.startswith("rq:"):
        return key
    return prefix if key == "." else prefix + key


@dataclass(frozen=True, slots=True)
class Role:
    """One kind of user. `grants[0]` are its root permissions; each other grant is a selector."""

    name: str
    grants: Sequence[Grant]

    def line(self, keys: Keys, password_hash: str = LOCKED) -> str:
        """`user NAMESPACE-ROLE …`."""
        root, *others = (" ".join(grant.rules(keys.prefix)) for grant in self.grants)
        rules = ["resetkeys resetchannels -@all", root, *(f"({other})" for other in others)]
        return f"user {user_name(keys, self.name)} on #{password_hash} {' '.join(rules)}"


def user_name(keys: Keys, role: str) -> str:
    return f"{keys.namespace}-{role}"


def password_hash(password: str) -> str:
    """SHA-256 in hex, as an ACL file needs it. It has no salt, so passwords must be long and random."""
    return hashlib.sha256(password.encode()).hexdigest()


def acl_file(namespace: str, hashes: Mapping[str, str]) -> str:
    """A whole ACL file. `hashes`: password hashes by role, and for "default". A user without one is locked.

    Redis replaces all its users with those of the file, so the file also defines the `default` user, which may do
    everything.
    """
    keys = Keys(namespace)
    lines = [f"user default on #{hashes.get('default', LOCKED)} ~* &* +@all"]
    return "\n".join([*lines, *(role.line(keys, hashes.get(role.name, LOCKED)) for role in ROLES.values())]) + "\n"


_CONNECT = "hello ping time select client|setinfo client|setname"
_SCRIPTS = "eval evalsha script|load"
_CLUSTER = "cluster|slots wait"  # to find the master, and to wait for its replicas

# The commands of create_call, stop_call and end_call, for all users that run them. These write no streams except logs
# and inboxes.
_CALL_COMMANDS = (
    "hget hmget hset hsetnx hexists hdel hincrby hgetall del persist pexpire strlen hstrlen xread xrange xlen xadd "
    "sadd srem scard smembers sscan zadd zrem zrange zremrangebyscore lpush ltrim lrange"
)
_CALL_KEYS = ". call:* inbox:* session:* affinity:* residency:* stats usage usage:sessions"
_CALL_WRITES = f"{_CALL_KEYS} deadlines finished parked:* held:* starving:*"

_PRODUCER = (
    Grant(f"{_CONNECT} {_CLUSTER} {_SCRIPTS} {_CALL_COMMANDS}", f"{_CALL_KEYS} finished", _CALL_WRITES),
    Grant("xtrim", write="inbox:*"),  # to remove the entries that it has read
    Grant("xadd", write="calls"),
    Grant("xrevrange xlen", read="calls"),
    # To take a waiting call out of its queue, and to send a cancel to the worker of a running call.
    Grant("hincrby hexists", read="engine:*", write="engine:*"),
    Grant("llen lpush pexpire", read="engine:*:bell", write="engine:*:bell"),
    Grant("hdel", write="engine:*:work"),
    Grant("zscore", read="engine:*:queue"),
    Grant("zrem", write="engine:*:queue engine:*:starving"),
    Grant("hmget hset", read="engine:*:residents", write="engine:*:residents"),
    Grant("xadd pexpire", write="engine:*:control"),
)
_VIEWS = (
    Grant(
        f"{_CONNECT} {_CLUSTER} info hget hgetall hmget scan smembers scard lrange zrange zcard zcount "
        "zscore srandmember xlen xrange xrevrange xread xinfo|groups xinfo|stream exists ttl type",
        read="*",
    ),
)
# RQ's queues in Redis have no namespace: a user that may write them can command the nodes of all namespaces.
_RQ = Grant(
    "get set setex del unlink exists expire persist ttl hget hgetall hmget hset hsetnx hdel hexists hlen hincrby "
    "hincrbyfloat lpush rpush lpop lrem llen lrange lmove blmove brpop blpop rpoplpush brpoplpush lpos sadd srem "
    "smembers scard sismember zadd zrem zcard zrange zrangebyscore zrevrange zremrangebyscore zscore xadd xread "
    "xrevrange xrange xdel xtrim xlen multi exec watch unwatch discard evalsha eval script|load time publish "
    "subscribe unsubscribe psubscribe punsubscribe info client|list client|setname client|id client|info",
    "rq:*",
    "rq:*",
    "rq:pubsub:*",
)
# To check the eviction policy at the start (`rsm.broker.connection.eviction`).
_SERVER = "info"
# To fill and empty engines' queues, and to give calls back to the router.
_FLEET_COMMANDS = "llen zcard zscore zrangebyscore xrevrange xack xdel unlink blpop"
_ROUTER = (
    Grant(
        f"{_CONNECT} {_CLUSTER} {_SCRIPTS} {_CALL_COMMANDS} {_FLEET_COMMANDS} {_SERVER} zcount expire multi exec "
        "discard xgroup|create xgroup|delconsumer xinfo|consumers xpending xreadgroup xautoclaim",
        "*",
        "* .",
    ),
)
_WORKER = (
    Grant(
        f"{_CONNECT} {_CLUSTER} {_SCRIPTS} {_CALL_COMMANDS} {_FLEET_COMMANDS} {_SERVER} zcount",
        f"{_CALL_KEYS} engine:* engines finished deadlines parked:* held:* starving:* holding dead",
        f"{_CALL_WRITES} engine:* engines",
    ),
    Grant("xadd", write="calls"),
    Grant("xadd xdel", write="dead"),
)

ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        # A program in another language that only pushes with XADD and reads the outcome of its calls.
        Role(
            "pusher",
            (
                Grant(f"{_CONNECT} xadd", write="calls"),
                Grant("hget hmget hgetall exists xread xrange", read="call:* inbox:*"),
            ),
        ),
        Role("producer", _PRODUCER),
        Role("router", _ROUTER),
        Role("worker", _WORKER),
        # `rsm node`: the permissions of a worker, because it starts workers with its own user, and RQ.
        Role("node", (*_WORKER, *_VIEWS, _RQ)),
        Role("observer", _VIEWS),
        # A person: views, cancels, drains, replays of dead letters, engines on nodes.
        Role(
            "operator",
            (
                *_WORKER[:1],
                *_PRODUCER[1:3],
                *_VIEWS,
                Grant("xdel xadd", write="dead"),
                _RQ,
                Grant("set del", write="order:*"),  # to mark that a command waits for its order to a node
            ),
        ),
    )
}
