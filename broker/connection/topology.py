"""Where Redis is: what a URL says of it, and how to find the master that serves a namespace now.

A namespace lives in one slot (`keys.py`), so it has one master at a time, also on a Redis Cluster, and no
cluster client is needed: it is enough to ask some node for the owner of the slot, or a Sentinel for the master, each
time a connection is made. The questions and the reading of their answers are here; `failover.py` sends them.
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
    "(rediss+… for TLS); escape what a password holds of :/?#[]@ by %XX."
)
_PORTS = {"sentinel": 26379, "cluster": 6379}
_SENTINEL_LOGIN = {"sentinel_username": "username", "sentinel_password": "password"}
# How long one Sentinel or one node may take to answer where the master is, in seconds; then the next one is asked.
_ASK_S = 2.0


@dataclass(frozen=True, slots=True, repr=False)
class Place:
    """What a URL says.

    Attributes:
        scheme: `redis`, `rediss` or `unix`: how to connect.
        kind: `""` where the URL names the server, `sentinel` or `cluster`.
        options: keyword arguments of a redis-py connection.
        finder: finds the master; None where the URL names it.
    """

    scheme: str
    options: dict[str, Any]
    finder: Finder | None = None
    kind: str = ""


class Finder:
    """Asks several seeds in turn where the master is. Threads may share one.

    Args:
        seeds: Sentinels, or nodes of the cluster.
        question: the command to send to one of them.
        read: makes the master's address of the answer (and of the address that gave it), None if it says none.
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
        """All seeds, each time beginning with another: one that is cut off from the others tells old news."""
        self._seeds = [*self._seeds[1:], self._seeds[0]]
        return self._seeds

    def __repr__(self) -> str:
        return f"Finder({self.question[0]}, {len(self._seeds)} seeds)"


def place_of(url: str, namespace: str) -> Place:
    """What a Redis URL says.

    Raises:
        InvalidRequest: it has none of the forms; the message gives them.
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
    """A URL with several hosts, taken apart.

    Attributes:
        options: of a connection to a data node, without its address.
        seed: of a connection to a seed, without address and login.
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
    """Of CLUSTER SLOTS, whose rows are [first slot, last slot, [host, port, …] of the master, replicas …]."""
    for first, last, (host, port, *_), *_ in reply:
        if first <= slot <= last:
            name = _text(host or b"")
            # A node that does not know its own name means the one it was asked by; "?" is a node it cannot name.
            return None if name == "?" else (name or asked[0], int(port))
    return None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
