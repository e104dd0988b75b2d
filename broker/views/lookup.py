"""Finds ids by a part of them, and lists ids to choose from, because people read short ids and type little.

Reads only. It looks for a part among all records in Redis, of open and finished calls. So a part never silently matches
another call than the one that the user saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import redis

from rsm.broker.errors import AccessDenied, InvalidRequest
from rsm.broker.protocol.codec import text
from rsm.broker.protocol.ids import SHORTEST_PART, is_id, is_short_form, named_by
from rsm.broker.protocol.keys import Keys, literal

_SCAN = 1000
_SHOWN = 5
_CUT = "…"


class Lookup:
    """Finds ids in one namespace. `server`: a client with the broker's options."""

    def __init__(self, keys: Keys, server: Any) -> None:
        self._keys = keys
        self._redis = server

    # -- by a part

    def call(self, part: str) -> str:
        """The id of the call that `part` matches; `part` itself if there is no such call.

        Raises:
            InvalidRequest: it matches several.
        """
        return self._complete(part, "call", self._keys.call, "state")

    def session(self, part: str) -> str:
        """Like `call`, for sessions."""
        return self._complete(part, "session", self._keys.session, "arrivals")

    def session_of_short_form(self, part: str) -> str:
        """Like `session`, if `part` may also be the name of a new session: completes only short forms."""
        return self.session(part) if is_short_form(part) else part

    def _complete(self, part: str, what: str, key: Callable[[str], str], field: str) -> str:
        """`field`: a field that every record of this kind has."""
        cut = part.strip(_CUT)
        if not is_id(cut):
            return part
        if len(cut) < SHORTEST_PART or self._redis.hget(key(cut), field):
            return cut
        try:
            return one_of(cut, self._ids_with(cut, key("")), what)
        except (AccessDenied, redis.RedisError):
            return cut  # a user without permission to scan can still give a whole id

    def _ids_with(self, part: str, prefix: str) -> list[str]:
        keys = self._redis.scan_iter(match=f"{literal(prefix)}*{literal(part)}*", count=_SCAN, _type="hash")
        return [text(key).removeprefix(prefix) for key in keys]

    # -- to choose from

    def open_calls(self, most: int) -> Iterator[str]:
        """Ids of running and waiting calls, at most `most` from each queue."""
        engines = list(self.engines())
        for key in chain(map(self._keys.running, engines), map(self._keys.queue, engines), self._unassigned()):
            yield from map(text, self._redis.zrange(key, 0, most - 1))

    def _unassigned(self) -> Iterator[str]:
        yield from (self._keys.held(text(model)) for model in self._redis.smembers(self._keys.holding))
        yield from map(text, self._redis.scan_iter(match=literal(self._keys.parked("")) + "*", count=_SCAN))

    def finished_calls(self, most: int) -> Iterator[str]:
        """Ids of the latest finished calls, the latest first."""
        for _, fields in self._redis.xrevrange(self._keys.finished, count=most):
            yield from reversed(text(fields.get(b"ids")).split())

    def sessions(self) -> Iterator[str]:
        """Ids of sessions, in no order."""
        prefix = self._keys.session("")
        keys = self._redis.scan_iter(match=literal(prefix) + "*", count=_SCAN, _type="hash")
        return (text(key).removeprefix(prefix) for key in keys)

    def engines(self) -> Iterator[str]:
        return (text(e) for e in self._redis.zrange(self._keys.engines, 0, -1))


def one_of(part: str, ids: list[str], what: str) -> str:
    """The one id that `part` matches; `part` itself if it matches none.

    Raises:
        InvalidRequest: it matches several; the message lists them.
    """
    found = named_by(part, ids)
    if len(found) > 1:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise InvalidRequest(
            f"{part} matches several {what}s: {', '.join(sorted(found)[:_SHOWN])}{more}. Give more of the id."
        )
    return found[0] if found else part
