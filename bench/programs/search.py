"""Throughput at equal latency: the highest arrival rate at which a system keeps a mean latency.

All systems use rates from one geometric grid, so they see the same programs at the same times, and searches share
measured points. Between two grid points the curve is interpolated linearly in logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp, inf, log, log2

# Grid points per doubling of the rate.
PER_DOUBLING = 2


def rate_of(point: int) -> float:
    """Returns the programs per second at a grid point."""
    return float(2.0 ** (point / PER_DOUBLING))


def rate_point(rate: float) -> int:
    """Returns the grid point nearest to a rate."""
    return round(PER_DOUBLING * log2(rate))


@dataclass(slots=True)
class Curve:
    """Mean latency over the rate, of one system on one workload. A point costs a run, so each is measured once."""

    measure: Callable[[int], float]
    lowest: int
    highest: int
    points: dict[int, float] = field(default_factory=dict)

    def at(self, point: int) -> float:
        if point not in self.points:
            self.points[point] = self.measure(point)
        return self.points[point]

    def sustained(self, level: float) -> float:
        """Returns the rate with a mean latency of `level`; 0 if the lowest rate exceeds it, `highest` if none does."""
        below, above = self._bracket(level)
        if above == self.lowest:
            return 0.0
        if below == self.highest:
            return rate_of(below)
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (middle, above) if self.at(middle) <= level else (below, middle)
        return interpolate(below, above, self.points, level)

    def _bracket(self, level: float) -> tuple[int, int]:
        """Returns two points between which the curve crosses the level.

        It doubles the rate from the lowest, because a run's cost grows with its rate, and far more beyond the level.
        """
        below = above = self.lowest
        while self.at(above) <= level:
            below = above
            if above == self.highest:
                break
            above = min(above + PER_DOUBLING, self.highest)
        return below, above


def interpolate(below: int, above: int, points: Mapping[int, float], level: float) -> float:
    """Returns the rate between two grid points at which the latency is `level`."""
    low, high = points[below], points[above]
    if high == inf or high <= low:
        return rate_of(below)
    share = (log(level) - log(low)) / (log(high) - log(low))
    return exp(log(rate_of(below)) + share * (log(rate_of(above)) - log(rate_of(below))))
