"""Where Redis is: parses its URL, and finds the master that serves a namespace.

A namespace lives in one slot (`keys.py`), so it has one master at a time, on a Redis Cluster too. Therefore no cluster
client is needed: each new connection asks a Sentinel for the master, or any node for the owner of the slot. This module
defines the questions and reads the answers; `failover.py` sends them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis.connection import parse_url
from redis.crc import key_slot

from rsm.broker.errors import InvalidRequest
from rsm.broker.protocol.keys import Keys

Address = tuple[str, int]

# Its message never quotes the URL, which may hold a password.
_WRONG = (
    "The Redis URL must be redis://[user:password@]host[:port][/db], rediss://… (TLS), unix:///path, "
    "redis+sentinel://[user:password@]host:port,host:port/MASTER[/db] or redis+cluster://[user:password@]host:port,… "
    "(rediss+… for TLS). In a password, write each of the characters :/?#[]@ as %XX."
)
_PORTS = {"sentinel": 26379, "cluster": 6379}
_SENTINEL_LOGIN = {"sentinel_username": "username", "sentinel_password": "password"}
# How long one Sentinel or node may take to answer, in seconds, before the next one is asked.
_ASK_S = 2.0


@dataclass(frozen=True, slots=True, repr=False)
class Place:
    """A parsed URL.

    Attributes:
        scheme: how to connect: `redis`, `rediss` or `unix`.
        kind: `sentinel`, `cluster`, or `""` if the URL names the server itself.
        options: keyword arguments of a redis-py connection.
        finder: finds the master; None if the URL names it.
    """

    scheme: str
    options: dict[str, Any]
    finder: Finder | None = None
    kind: str = ""


class Finder:
    """Describes how to ask several seeds in turn for the master. Threads may share one.

    Args:
        seeds: Sentinels, or nodes of the cluster.
        question: the command to send to a seed.
        read: returns the master's address from a seed's answer and that seed's address; None if the seed knows none.
        options: keyword arguments of a redis-py connection to a seed.
    """

    def __init__(
        self,
        seeds: Sequence[Address],
        question: tuple[str, ...],
        read: Callable[[Any, Address], Address | None],
        options: dict[str, Any],
    ) -> None:
        self.question = question
        self.read = read
        self.options = options
        self._seeds = list(seeds)

    def seeds(self) -> list[Address]:
        """All seeds, in rotating order, because a seed that is cut off from the others may answer with stale data."""
        self._seeds = [*self._seeds[1:], self._seeds[0]]
        return self._seeds

    def __repr__(self) -> str:
        return f"Finder({self.question[0]}, {len(self._seeds)} seeds)"


def place_of(url: str, namespace: str) -> Place:
    """Parses a Redis URL.

    Raises:
        InvalidRequest: it has none of the known forms; the message lists them.
    """
    try:
        base, _, kind = url.partition("://")[0].partition("+")
        if not kind:
            return Place(base, _options(url))
        if base not in ("redis", "rediss"):
            raise ValueError
        return _FORMS[kind](base, _Parts(url, kind), namespace)
    except (ValueError, KeyError):
        raise InvalidRequest(_WRONG) from None


class _Parts:
    """The parts of a URL with several hosts.

    Attributes:
        options: options of a connection to a data node, without its address.
        seed: options of a connection to a seed, without its address and login.
    """

    def __init__(self, url: str, kind: str) -> None:
        parts = urlsplit(url)
        user, at, hosts = parts.netloc.rpartition("@")
        query = dict(parse_qsl(parts.query))
        self.seeds = [_address(host, _PORTS[kind]) for host in hosts.split(",")]
        self.path = [unquote(p) for p in parts.path.split("/") if p]
        self.sentinel_login = {n: query.pop(o) for o, n in _SENTINEL_LOGIN.items() if o in query}
        self.options = _options(f"redis://{user}{at}seed?{urlencode(query)}")
        del self.options["host"]
        self.login = {n: self.options[n] for n in ("username", "password") if n in self.options}
        self.seed = {n: v for n, v in self.options.items() if n not in (*self.login, "max_connections")}
        self.seed |= {"protocol": 2, "socket_timeout": _ASK_S, "socket_connect_timeout": _ASK_S}


def _sentinel(scheme: str, parts: _Parts, _: str) -> Place:
    master, *db = parts.path
    if len(db) > 1:
        raise ValueError
    question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", master)
    finder = Finder(parts.seeds, question, _named_master, parts.seed | parts.sentinel_login)
    return Place(scheme, parts.options | {"db": int(db[0]) if db else 0}, finder, "sentinel")


def _cluster(scheme: str, parts: _Parts, namespace: str) -> Place:
    if parts.path not in ([], ["0"]):
        raise ValueError  # a cluster has one database
    slot = key_slot(Keys(namespace).prefix.encode())
    finder = Finder(
        parts.seeds, ("CLUSTER", "SLOTS"), lambda r, asked: _owner(r, asked, slot), parts.seed | parts.login
    )
    return Place(scheme, parts.options, finder, "cluster")


def shown_url(url: str) -> str:
    """A Redis URL without user, password and options."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return f"{url.partition('://')[0]}://…"
    return f"{parts.scheme}://{host}{parts.path}"


_FORMS: dict[str, Callable[[str, _Parts, str], Place]] = {"sentinel": _sentinel, "cluster": _cluster}


def _options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
    options.pop("connection_class", None)
    return options


def _address(text: str, default_port: int) -> Address:
    parts = urlsplit(f"//{text}")  # knows [::1]:6379
    if not parts.hostname or parts.path:
        raise ValueError
    return parts.hostname, parts.port or default_port


def _named_master(reply: Any, _: Address) -> Address | None:
    return (_text(reply[0]), int(reply[1])) if reply else None


def _owner(reply: Any, asked: Address, slot: int) -> Address | None:
    """From CLUSTER SLOTS. Its rows are [first slot, last slot, [host, port, …] of the master, replicas …]."""
    for first, last, (host, port, *_), *_ in reply:
        if first <= slot <= last:
            name = _text(host or b"")
            # An empty name means the address that was asked; "?" means that the node does not know the name.
            return None if name == "?" else (name or asked[0], int(port))
    return None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
