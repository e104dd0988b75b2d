"""Small samples of the workloads of bench/programs, and the engine that they are made for.

A run of some seconds must hold enough programs to mean something, on two cores. So lengths and delays are divided until
a call of each kind takes a tenth of a second or two, and the engine is small to match: few slots, little KV cache.
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
# vLLM as it comes: first come, first served, with prefix caching.
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
    """How a kind of program is made small: by what its lengths, delays and calls are divided; `most`: calls at most."""

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
# Programs to draw from. The texts of two runs are so far apart.
_MOST, _TEXTS = 400.0, 10**12
WORKLOADS = ("chat", "react", "tree", "mixed", "coding")
# Of what the engines can do at most: with all slots full, and every token that was ever computed still cached.
HIGH, LOW = 3.0, 0.2


def sample(workload: str, load: float, window_s: float, seed: int, run: int) -> list[ProgramSpec]:
    """Programs, of one kind, "mixed", or "all" kinds, that come within a window and are so much work for the engines.

    The same arguments give the same programs, but their texts are those of no other `run`: engines live on from run to
    run, and must not know them.
    """
    chosen: list[ProgramSpec] = []
    left = load * ENGINES * window_s
    for spec in _draw(workload, seed):
        if left <= 0:
            # The arrivals of a Poisson process, on the scale that gives just this load.
            scale = window_s / spec.arrival_s
            return [_renumbered(replace(p, arrival_s=p.arrival_s * scale), run) for p in chosen]
        chosen.append(spec)
        left -= work_s(spec)
    raise ValueError(f"There are not so many programs: a load of {load} for {window_s} s.")


@cache
def _draw(workload: str, seed: int) -> Sequence[ProgramSpec]:
    """Many programs, one a second; those of "all" kinds are equally many of each."""
    if workload == "all":
        parts = [_draw(kind, seed + n) for n, kind in enumerate(SHRINK)]
        return sorted((p for part in parts for p in part), key=lambda p: p.arrival_s)
    drawn = coding(1.0, _MOST, seed) if workload == "coding" else synthetic(workload, 1.0, _MOST, seed)
    return [SHRINK[p.kind].apply(p) for p in drawn]


def work_s(spec: ProgramSpec) -> float:
    """Seconds of an engine with all its slots full; each text is computed once."""
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
    """The same program in texts of its own: shared ones are shared with others of its run alone."""
    shift = run * _TEXTS

    def moved(call: CallSpec) -> CallSpec:
        prompt = tuple(s._replace(text=s.text + shift) for s in call.prompt)
        return replace(call, prompt=prompt, answer=call.answer + shift if call.answer else 0)

    return replace(spec, id=f"{spec.id}-r{run}", calls=tuple(map(moved, spec.calls)))
