"""The key figures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, nan
from statistics import fmean
from typing import Any

from rsm.simulation.results import Results


def summary(results: Results) -> dict[str, Any]:
    """The figures that `rsm simulate` shows. Times in seconds of virtual time; None if nothing ended.

    `response_…`: programs that ended, from arrival to end. `token_…`: the same without tool and human time, per
    generated token (the paper's program latency).
    """
    ended = [p for p in results.programs if p.ended_s is not None]
    responses = sorted(p.response_s or 0.0 for p in ended)
    tokens = sorted(((p.response_s or 0.0) - p.delay_s) / p.spec.output_tokens for p in ended)
    waits = sorted(c.started_s - c.ready_s for c in results.calls if c.started_s is not None)
    until = results.until_s or nan
    return {
        "programs": len(results.programs),
        "unfinished": len(results.unfinished),
        "calls": sum(e.calls for e in results.engines),
        "until_s": results.until_s,
        "response_mean_s": _mean(responses),
        "response_p95_s": quantile(responses, 0.95),
        "response_p99_s": quantile(responses, 0.99),
        "token_mean_s": _mean(tokens),
        "token_p95_s": quantile(tokens, 0.95),
        "token_p99_s": quantile(tokens, 0.99),
        "call_wait_mean_s": _mean(waits),
        "call_wait_p99_s": quantile(waits, 0.99),
        "output_tokens_per_s": sum(e.output_tokens for e in results.engines) / until,
        "hit_rate": results.hit_rate,
        "busy": fmean(e.busy_s for e in results.engines) / until,
        "preemptions": sum(e.preemptions for e in results.engines),
        "wall_s": results.wall_s,
    }


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """The smallest value that at least a share `q` of the values does not exceed."""
    return ordered[max(0, ceil(q * len(ordered)) - 1)] if ordered else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
