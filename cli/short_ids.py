"""Short, unambiguous forms of ids for tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rsm.broker.protocol.ids import short_form

# Ids up to this length are shown whole. Redis gives ids of this length to calls pushed by a bare XADD.
WHOLE = 15
_CUT = "…"


class ShortIds:
    """The short form of each id, or else its shortest beginning or end that is unique among these ids.

    `rsm call`, `rsm cancel` and the other commands accept what is shown here.
    """

    def __init__(self, ids: Iterable[str], *, whole: bool = False) -> None:
        """`whole`: show the ids unchanged."""
        known = sorted(set(ids))
        self._shown = {i: i if whole else short_form(i) for i in known}
        long = [i for i in known if len(self._shown[i]) > WHOLE and self._shown[i] == i and not whole]
        length = WHOLE - len(_CUT)
        while long:
            ends = {end: Counter(_part(i, length, end) for i in known) for end in ("front", "back")}
            for i in long:
                unique = next((end for end, parts in ends.items() if parts[_part(i, length, end)] == 1), None)
                if unique is not None or length >= len(i):
                    self._shown[i] = _cut(i, length, unique or "front")
            long = [i for i in long if self._shown[i] == i and len(i) > length]
            length += 1

    def __getitem__(self, value: str) -> str:
        return self._shown.get(value, value)


def _part(value: str, length: int, end: str) -> str:
    return value[:length] if end == "front" else value[-length:]


def _cut(value: str, length: int, end: str) -> str:
    if len(value) <= length + len(_CUT):
        return value
    return value[:length] + _CUT if end == "front" else _CUT + value[-length:]
