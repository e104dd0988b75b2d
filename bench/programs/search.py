"""Throughput at equal latency: the highest rate of arrivals at which a system keeps a mean latency.

Rates lie on one geometric grid for all systems: systems meet the same programs at the same times, and a point that one
search has visited serves the next. Between two points of the grid the curve is taken for straight in logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp, inf, log, log2

# Points of the grid in a doubling of the rate.
PER_DOUBLING = 2


def rate_of(point: int) -> float:
    """Programs a second at a point of the grid."""
    return float(2.0 ** (point / PER_DOUBLING))


def rate_point(rate: float) -> int:
    """The point of the grid that is nearest to a rate."""
    return round(PER_DOUBLING * log2(rate))


@dataclass(slots=True)
class Curve:
    """Mean latency over the rate, of one system on one workload; a point costs a run, so each is measured once."""

    measure: Callable[[int], float]
    lowest: int
    highest: int
    points: dict[int, float] = field(default_factory=dict)

    def at(self, point: int) -> float:
        if point not in self.points:
            self.points[point] = self.measure(point)
        return self.points[point]

    def sustained(self, level: float) -> float:
        """The rate at which the mean latency is `level`; 0: even the lowest has more; the highest, if that has less."""
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
        """Two points between which the curve crosses the level. From the lowest rate on by doublings, as a run costs
        what its rate is, and beyond the level much more."""
        below = above = self.lowest
        while self.at(above) <= level:
            below = above
            if above == self.highest:
                break
            above = min(above + PER_DOUBLING, self.highest)
        return below, above


def interpolate(below: int, above: int, points: Mapping[int, float], level: float) -> float:
    """The rate between two points of the grid at which the latency is `level`."""
    low, high = points[below], points[above]
    if high == inf or high <= low:
        return rate_of(below)
    share = (log(level) - log(low)) / (log(high) - log(low))
    return exp(log(rate_of(below)) + share * (log(rate_of(above)) - log(rate_of(below))))
