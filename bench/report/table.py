"""Markdown tables, and the figures in them: medians with minimum and maximum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of a figure over the runs, with its minimum and maximum."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return cls(median(ordered), ordered[0], ordered[-1])

    def text(self, digits: int) -> str:
        if self.least == self.greatest:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} [{self.least:,.{digits}f}-{self.greatest:,.{digits}f}]"


def table_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
