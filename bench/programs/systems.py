"""The systems that are compared: a router's policy and an engine's scheduler, with their settings, under a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class System:
    """One way to serve programs.

    Attributes:
        policy: policy of the router.
        scheduler: scheduler inside the engines and of their queues.
        by_program: whether a call starts at the level of its program's service. False: each call starts at level 0.
        settings: other settings of the broker (RSM_*) that differ from the defaults.
        fleet: other fields of the simulator's FleetConfig.
    """

    name: str
    label: str
    policy: str
    scheduler: str
    by_program: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    fleet: Mapping[str, Any] = field(default_factory=dict)

    def but(self, name: str, label: str, **changes: Any) -> System:
        """Returns a variant with some fields changed; `settings` are merged with these."""
        changes["settings"] = {**self.settings, **changes.get("settings", {})}
        return replace(self, name=name, label=label, **changes)


FCFS_RR = System("fcfs_rr", "FCFS + round robin", "round_robin", "fcfs", by_program=False)
FCFS_LL = System("fcfs_ll", "FCFS + least loaded", "least_loaded", "fcfs", by_program=False)
# The paper's unit of service is time; chunked prompts are our addition.
_PAPERS = {"service_unit": "time", "prompt_chunk": 0}
MLFQ = System("mlfq", "MLFQ per call + least loaded", "least_loaded", "plas", by_program=False, settings=_PAPERS)
HASH = System("hash", "FCFS + hard session hash", "session_hash", "fcfs", by_program=False)
PAPER = System("paper", "PLAS/ATLAS + Algorithm 2", "bench.programs.algorithm2:Algorithm2", "plas", settings=_PAPERS)
OURS = System(
    "ours",
    "ours",
    "cost",
    "plas",
    settings={"service_unit": "time", "service_rule": "total", "admission": True, "admission_factor": 0.8},
)

MAIN = (FCFS_RR, FCFS_LL, MLFQ, HASH, PAPER, OURS)
# For fleets of other sizes.
SCALING = (FCFS_RR, PAPER, OURS)
# Our scheduler with each routing policy. Admission is off, because it is part of routing.
ROUTING = tuple(
    OURS.but(
        f"route_{policy}", f"our scheduler + {policy.replace('_', ' ')}", policy=policy, settings={"admission": False}
    )
    for policy in ("round_robin", "least_loaded", "session_hash", "autellix", "cost")
)

_BOUNDS = {
    "1": "",
    "3": "4000 64000",
    "12": "500 1000 2000 4000 8000 16000 32000 64000 128000 256000 512000",
}
ABLATIONS = (
    FCFS_RR,
    PAPER,
    OURS,
    *(OURS.but(f"k{k}", f"K = {k}", settings={"level_bounds": bounds}) for k, bounds in _BOUNDS.items()),
    *(OURS.but(f"beta{beta}", f"β = {beta}", settings={"starvation_beta": beta}) for beta in (0, 2, 32)),
    *(
        OURS.but(f"unit_{unit}", f"service in {unit}", settings={"service_unit": unit})
        for unit in ("tokens", "work", "kv")
    ),
    OURS.but("no_admission", "without admission", settings={"admission": False}),
    OURS.but("factor1", "admission factor 1.0", settings={"admission_factor": 1.0}),
    *(
        OURS.but(
            f"piece{tokens}",  # a key of bench/results/programs.json
            f"chunks of {tokens} tokens" if tokens else "prompts not chunked",
            settings={"prompt_chunk": tokens},
        )
        for tokens in (0, 128)
    ),
    FCFS_RR.but("fcfs_small", "FCFS + round robin, steps of 768 tokens", fleet={"max_num_batched_tokens": 768}),
    OURS.but("no_stealing", "without stealing", settings={"stealing": False}),
    OURS.but("path", "service by the longest path", settings={"service_rule": "path"}),
    OURS.but("in_engine_fcfs", "FCFS inside the engines", scheduler="fcfs"),
    *(
        PAPER.but(f"threshold{tokens}", f"paper, threshold {tokens}", settings={"cache_token_threshold": tokens})
        for tokens in (0, 8192)
    ),
)
SYSTEMS = {s.name: s for s in (*MAIN, *ROUTING, *ABLATIONS)}
