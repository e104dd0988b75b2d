"""When a waiting call would take a running one's place, as seen from outside the engine's process."""

from __future__ import annotations

from collections.abc import Iterable

from rsm.workers.backends.base import Job
from rsm.workers.scheduling.plas import NOTHING_IS_BETTER, PlasRules, Rank
from rsm.workers.scheduling.service import ServiceUnit, Used, charge


def worst_rank(jobs: Iterable[tuple[Job, Used]], slots: int, unit: ServiceUnit, rules: PlasRules) -> Rank:
    """What a call must be better than to take the place of one of these, of which the engine runs the best.

    Seen from outside the engine's process: of a promotion in there nothing is known, nor of what waits for KV blocks.
    """
    ranks = sorted(_rank(job, charge(unit, used), rules) for job, used in jobs)
    return ranks[slots - 1] if len(ranks) >= slots else NOTHING_IS_BETTER


def _rank(job: Job, own: float, rules: PlasRules) -> Rank:
    promoted = job.level < rules.level_of(job.inherited)  # it began anew in the first level
    return job.priority, rules.level_of(own if promoted else job.inherited + own)
