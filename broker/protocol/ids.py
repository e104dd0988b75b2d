"""Ids: which are valid, and how new ones are made."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterable

from rsm.broker.errors import InvalidRequest

# Ids become parts of Redis keys, so they must not contain characters that could lead out of their key space: braces,
# white space, glob characters.
ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Suffixes of keys that belong to a call, a session or an engine (keys.py). A call "c:events" would share its key with
# the log of call "c".
RESERVED_ENDS = (
    ":events", ":calls", ":recent", ":children", ":queue", ":work", ":starving", ":running", ":bell", ":control",
    ":residents",
)  # fmt: skip
MODEL_PATTERN = re.compile(r"[A-Za-z0-9._:/@+=-]{1,256}")

# The format of `new_id`: milliseconds, a counter of the process, the process.
_MADE_PATTERN = re.compile(r"[0-9a-f]{12}-([0-9a-f]{6})-([0-9a-f]{10})")
_SHORT_PATTERN = re.compile(r"(0|[1-9a-f][0-9a-f]{0,5})-[0-9a-f]{10}")
# The shortest part that identifies an id. With less, a typing error could cancel another call.
SHORTEST_PART = 8

_process = os.urandom(5).hex()
_counter = itertools.count()


def _after_fork() -> None:
    global _process
    _process = os.urandom(5).hex()


os.register_at_fork(after_in_child=_after_fork)


def new_id() -> str:
    """A new call, session or client id. Ids of one process sort by age, so equal arrivals keep their order."""
    return f"{int(time.time() * 1000):012x}-{next(_counter) & 0xFFFFFF:06x}-{_process}"


def short_form(value: str) -> str:
    """The unique end of an id from `new_id`: its counter without leading zeros, and its process.

    The front is nearly the same for all calls of an hour. Ids that users chose are returned whole.
    """
    made = _MADE_PATTERN.fullmatch(value)
    return f"{made[1].lstrip('0') or '0'}-{made[2]}" if made else value


def is_short_form(value: str) -> bool:
    return bool(_SHORT_PATTERN.fullmatch(value))


def named_by(part: str, ids: Iterable[str]) -> list[str]:
    """The ids that `part` may mean: an equal id, else an equal short form, else all that start or end with it."""
    known = list(dict.fromkeys(ids))
    for matches in (lambda i: i == part, lambda i: short_form(i) == part):
        found = [i for i in known if matches(i)]
        if found:
            return found
    return [i for i in known if i.startswith(part) or i.endswith(part)] if len(part) >= SHORTEST_PART else []


def check_id(value: str, what: str) -> str:
    """Returns `value` if it is a valid id.

    Raises:
        InvalidRequest: it is not valid; the message calls it `what`.
    """
    if not ID_PATTERN.fullmatch(value):
        raise InvalidRequest(f"{what} must be 1 to 128 characters from A-Z a-z 0-9 . _ : - ; got {shorten(value)!r}.")
    if value.endswith(RESERVED_ENDS):
        raise InvalidRequest(f"{what} must not end in {', '.join(RESERVED_ENDS)}; got {shorten(value)!r}.")
    return value


def is_id(value: str) -> bool:
    """Whether `check_id` would accept it."""
    return bool(ID_PATTERN.fullmatch(value)) and not value.endswith(RESERVED_ENDS)


def check_model(value: str) -> str:
    """Returns `value` if it is a valid model name.

    Raises:
        InvalidRequest: it is not.
    """
    if not MODEL_PATTERN.fullmatch(value):
        raise InvalidRequest(f"model must be 1 to 256 characters of a model name or path; got {shorten(value)!r}.")
    return value


def shorten(value: str, limit: int = 40) -> str:
    """A value for an error message, cut to `limit` characters."""
    return value if len(value) <= limit else value[: limit - 1] + "…"
