"""Redis users with the roles of `rsm.broker.protocol.acl`, on the tests' server."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis

from rsm.broker import Settings
from rsm.broker.connection.factory import connect
from rsm.broker.protocol.acl import ROLES, password_hash, user_name
from rsm.broker.protocol.keys import Keys


class Roles:
    """The users of one namespace. The password of each is the name of its role, plus "-secret"."""

    def __init__(self, db: redis.Redis, settings: Settings) -> None:
        self._db: Any = db
        self._settings = settings
        self._keys = Keys(settings.namespace)

    def create(self) -> None:
        for role in ROLES.values():
            _, _, rules = role.line(self._keys, password_hash(secret(role.name))).split(" ", 2)
            parts = [rules[: rules.index("(")], *_selectors(rules)] if "(" in rules else [rules]
            words = [*shlex.split(parts[0]), *parts[1:]]
            self._db.execute_command("ACL SETUSER", user_name(self._keys, role.name), "reset", *words)

    def drop(self) -> None:
        self._db.execute_command("ACL DELUSER", *(user_name(self._keys, name) for name in ROLES))

    def settings(self, role: str, password: str | None = None) -> Settings:
        """The settings of a process that runs under a role."""
        path = self._settings.url().removeprefix("unix://")
        login = f"{user_name(self._keys, role)}:{secret(role) if password is None else password}"
        return self._settings.with_redis(f"unix://{login}@{path}")

    @contextmanager
    def client(self, role: str) -> Iterator[redis.Redis]:
        made = connect(self.settings(role))
        try:
            yield made
        finally:
            made.close()

    def refusals(self) -> list[str]:
        """What Redis has refused these users, from its ACL log."""
        log = self._db.execute_command("ACL LOG")
        rows = [dict(zip(map(str, row[::2]), row[1::2], strict=True)) if isinstance(row, list) else row for row in log]
        ours = [{_text(k): _text(v) for k, v in row.items()} for row in rows]
        names = ("username", "reason", "object", "context")
        return sorted({" ".join(row[n] for n in names) for row in ours if self._is_ours(row["username"])})

    def _is_ours(self, user: str) -> bool:
        return user.startswith(f"{self._settings.namespace}-")


def secret(role: str) -> str:
    return f"{role}-secret"


def _selectors(rules: str) -> list[str]:
    return [f"({part.rpartition(')')[0]})" for part in rules.split("(")[1:]]


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
