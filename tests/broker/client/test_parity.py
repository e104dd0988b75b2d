"""Four clients, one surface: the same public names, the same parameters, with and without `await`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from rsm.broker import AsyncCall, AsyncClient, AsyncShardedClient, CallHandle, Client, ShardedClient
from rsm.broker.client.core import ClientCore

# Names that only one of them has, and why.
OWN = {
    AsyncCall: {"__await__"},  # a call is awaited; a handle has `result`
    ShardedClient: {"client", "namespaces"},
    AsyncShardedClient: {"client", "namespaces"},
    # The parts of a client; a sharded client has several of each.
    Client: set[str](),
    AsyncClient: set[str](),
}
METHODS = sorted(name for name in vars(Client) | vars(ClientCore) if not name.startswith("_"))


def surface(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults, without `self`."""
    found = list(inspect.signature(function).parameters.values())
    return [(p.name, p.kind, p.default) for p in found[1:]]


@pytest.mark.parametrize("other", [AsyncClient, ShardedClient, AsyncShardedClient])
def test_names_of_clients(other: type) -> None:
    assert surface(other) - OWN[other] == surface(Client)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("other", [AsyncClient, ShardedClient, AsyncShardedClient])
def test_signatures_of_clients(other: type, name: str) -> None:
    assert parameters(getattr(other, name)) == parameters(getattr(Client, name))


def test_the_public_names() -> None:
    """The tests above would miss a name that disappears from all four at once."""
    assert set(METHODS) == {
        "cancel", "cancel_session", "close", "deadline_in", "handle", "prepare", "record", "result", "stream",
        "submit", "submit_many",
    }  # fmt: skip


def test_options_of_clients() -> None:
    assert parameters(AsyncClient.__init__) == parameters(Client.__init__)
    assert parameters(AsyncShardedClient.__init__) == parameters(ShardedClient.__init__)
    assert parameters(Client.prepare) == [p for p in parameters(Client.submit) if p[0] != "on_overload"]


def test_handles() -> None:
    assert surface(AsyncCall) == surface(CallHandle)
    for name in surface(CallHandle):
        made, other = getattr(CallHandle, name), getattr(AsyncCall, name)
        if callable(made):
            assert parameters(other) == parameters(made), name


@pytest.mark.parametrize("name", METHODS)
def test_only_methods_that_use_redis_are_awaited(name: str) -> None:
    asks = inspect.iscoroutinefunction(getattr(AsyncClient, name)) or name == "stream"
    assert asks == (name != "prepare")
    sharded = getattr(AsyncShardedClient, name)
    assert inspect.iscoroutinefunction(inspect.unwrap(sharded)) == inspect.iscoroutinefunction(
        getattr(AsyncClient, name)
    )
