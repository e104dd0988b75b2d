"""Small samples of the workloads of bench/programs, and the engine that they are made for.

A run of a few seconds on two cores must contain enough programs to be meaningful. So lengths and delays are divided
until a call takes 0.1 to 0.2 s, and the engine is equally small: few slots, little KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

from bench.programs.live.replay import scaled
from bench.programs.workloads.synthetic import synthetic
from bench.programs.workloads.traces import coding
from rsm.simulation.workload.programs import CallSpec, ProgramSpec
from rsm.workers.backends.sim.engine import SimTimes

ENGINES, SLOTS = 4, 4
TIMES = SimTimes()
KV_TOKENS, STEP_TOKENS = 40_000, 2048
# Like vLLM with its defaults: first come, first served, with prefix caching.
STOCK: dict[str, Any] = {
    "kv_tokens": KV_TOKENS,
    "max_num_batched_tokens": STEP_TOKENS,
    "scheduler": "fcfs",
    "step_s": TIMES.step_s,
    "prefill_token_s": TIMES.prefill_token_s,
    "decode_seq_s": TIMES.decode_seq_s,
    "context_token_s": TIMES.context_token_s,
}


@dataclass(frozen=True, slots=True)
class Shrink:
    """How to shrink one kind of program: divisors of its lengths, delays and calls; `most`: maximum number of calls."""

    lengths: int
    delays: float
    calls: int
    most: int

    def apply(self, spec: ProgramSpec) -> ProgramSpec:
        small = scaled(spec, self.lengths, min(self.most, ceil(len(spec.calls) / self.calls)))
        return replace(small, calls=tuple(replace(c, delay_s=c.delay_s / self.delays) for c in small.calls))


SHRINK = {
    "chat": Shrink(lengths=12, delays=100, calls=1, most=16),
    "react": Shrink(lengths=2, delays=20, calls=2, most=16),
    "tree": Shrink(lengths=4, delays=10, calls=5, most=80),
    "coding": Shrink(lengths=6, delays=200, calls=4, most=12),
}
# Seconds of arrivals to draw from, at one program per second; distance between the text numbers of two runs.
_MOST, _TEXTS = 400.0, 10**12
WORKLOADS = ("chat", "react", "tree", "mixed", "coding")
# Loads, relative to the engines' maximum: all slots full, and every computed token still cached.
HIGH, LOW = 3.0, 0.2


def sample(workload: str, load: float, window_s: float, seed: int, run: int) -> list[ProgramSpec]:
    """Returns programs of one kind, "mixed", or "all" kinds, that arrive within a window and put `load` on the engines.

    The same arguments give the same programs, but each `run` has its own texts. Engines keep their caches from run to
    run, and must not find texts of an earlier one.
    """
    chosen: list[ProgramSpec] = []
    left = load * ENGINES * window_s
    for spec in _draw(workload, seed):
        if left <= 0:
            # Scale the arrivals of the Poisson process to give exactly this load.
            scale = window_s / spec.arrival_s
            return [_renumbered(replace(p, arrival_s=p.arrival_s * scale), run) for p in chosen]
        chosen.append(spec)
        left -= work_s(spec)
    raise ValueError(
        f"A load of {load} for {window_s} s needs more programs than a sample has. Choose a smaller load or window."
    )


@cache
def _draw(workload: str, seed: int) -> Sequence[ProgramSpec]:
    """Draws many programs, one per second of each kind; "all" merges all kinds."""
    if workload == "all":
        drawn_by_kind = [_draw(kind, seed + n) for n, kind in enumerate(SHRINK)]
        return sorted((p for programs in drawn_by_kind for p in programs), key=lambda p: p.arrival_s)
    drawn = coding(1.0, _MOST, seed) if workload == "coding" else synthetic(workload, 1.0, _MOST, seed)
    return [SHRINK[p.kind].apply(p) for p in drawn]


def work_s(spec: ProgramSpec) -> float:
    """Returns a program's work, in seconds of an engine with all slots full that computes each text once."""
    seen: set[int] = set()
    total = 0.0
    for call in spec.calls:
        total += _call_work_s(call, sum(s.tokens for s in call.prompt if s.text not in seen))
        seen.update(s.text for s in call.prompt)
        seen.add(call.answer)
    return total


def _call_work_s(call: CallSpec, new: int) -> float:
    context = call.prompt_tokens + call.output_tokens / 2
    decode = TIMES.step_s / SLOTS + TIMES.decode_seq_s + context * TIMES.context_token_s
    return new * TIMES.prefill_token_s + call.output_tokens * decode


def _renumbered(spec: ProgramSpec, run: int) -> ProgramSpec:
    """Returns the program with text numbers of its run; shared texts are shared only within the run."""
    shift = run * _TEXTS

    def moved(call: CallSpec) -> CallSpec:
        prompt = tuple(s._replace(text=s.text + shift) for s in call.prompt)
        return replace(call, prompt=prompt, answer=call.answer + shift if call.answer else 0)

    return replace(spec, id=f"{spec.id}-r{run}", calls=tuple(map(moved, spec.calls)))
