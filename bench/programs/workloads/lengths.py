"""Long-tailed counts with a given mean: a log-normal distribution clipped at both ends, with a fitted location."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import erf, exp, log, sqrt
from random import Random


@dataclass(frozen=True, slots=True)
class Lengths:
    """Counts from `low` to `high` with mean `mean`; `sigma` is the deviation of their logarithm before clipping."""

    mean: float
    sigma: float
    low: int
    high: int
    mu: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.low < self.mean < self.high:
            raise ValueError(f"The mean {self.mean} must be between low ({self.low}) and high ({self.high}).")
        below, above = log(self.low) - 9 * self.sigma, log(self.high) + 9 * self.sigma
        for _ in range(60):
            mu = (below + above) / 2
            below, above = (mu, above) if _clipped_mean(mu, self) < self.mean else (below, mu)
        object.__setattr__(self, "mu", below)

    def draw(self, rng: Random) -> int:
        return round(min(max(rng.lognormvariate(self.mu, self.sigma), self.low), self.high))


def _clipped_mean(mu: float, lengths: Lengths) -> float:
    """Returns E[min(max(X, low), high)] of a log-normal X."""
    s = lengths.sigma
    low, high = (log(lengths.low) - mu) / s, (log(lengths.high) - mu) / s
    inside = exp(mu + s * s / 2) * (_normal(high - s) - _normal(low - s))
    return lengths.low * _normal(low) + inside + lengths.high * (1 - _normal(high))


def _normal(x: float) -> float:
    """Returns the standard normal distribution function."""
    return (1 + erf(x / sqrt(2))) / 2
