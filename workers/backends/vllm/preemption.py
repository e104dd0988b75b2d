"""The preemption threshold, estimated outside the engine process."""

from __future__ import annotations

from collections.abc import Iterable

from rsm.workers.backends.base import Job
from rsm.workers.scheduling.plas import NOTHING_IS_BETTER, PlasRules, Rank
from rsm.workers.scheduling.service import ServiceUnit, Used, charge


def worst_rank(jobs: Iterable[tuple[Job, Used]], slots: int, unit: ServiceUnit, rules: PlasRules) -> Rank:
    """The rank that a waiting call must beat to displace one of these jobs, of which the engine runs the best.

    An estimate from outside the engine process: promotions in there and calls that wait for KV blocks are not visible.
    """
    ranks = sorted(_rank(job, charge(unit, used), rules) for job, used in jobs)
    return ranks[slots - 1] if len(ranks) >= slots else NOTHING_IS_BETTER


def _rank(job: Job, own: float, rules: PlasRules) -> Rank:
    promoted = job.level < rules.level_of(job.inherited)  # it restarted in the first level
    return job.priority, rules.level_of(own if promoted else job.inherited + own)
