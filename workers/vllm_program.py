"""A call's program, as the scheduler in vLLM's engine process knows it. Needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from broker.settings import Settings
from workers.backend import Job
from workers.plas import PlasCall, PlasRules

LEVELS = 16  # levels of the router's queues that fit between two of vLLM's priorities

_PROMPT_UNITS, _OUTPUT_UNITS = 1, 2


def rules_of(settings: Settings) -> PlasRules:
    return PlasRules(bounds=settings.level_bounds, beta=settings.starvation_beta)


@dataclass(frozen=True, slots=True)
class Program:
    """What a scheduler in the engine is told of a call's program, in extra_args; class and level are its priority.

    Attributes:
        program_id: the program.
        program_service: service units that it has had.
        program_waited_ms: how long it has waited so far, in all.
        program_ran_ms: how long it has run so far.
    """

    program_id: str
    program_service: int = 0
    program_waited_ms: int = 0
    program_ran_ms: int = 0

    @classmethod
    def of_job(cls, job: Job) -> Program:
        return cls(job.program or job.session, job.inherited, job.waited_ms, job.ran_ms)

    @classmethod
    def of_request(cls, request: Any) -> Program:
        """Of a request that anybody may have made: whatever is not there, or no number, counts as 0."""
        params = getattr(request, "sampling_params", None)
        given: dict[str, Any] = getattr(params, "extra_args", None) or {}
        numbers = [given.get(f"program_{name}") for name in ("service", "waited_ms", "ran_ms")]
        known = (max(int(n), 0) if isinstance(n, int | float) else 0 for n in numbers)
        return cls(str(given.get("program_id", "")) or request.request_id, *known)


class Tracked:
    """One request of vLLM's.

    Attributes:
        cached: prompt tokens that were found in the cache when it first started; None: it has not.
        mark: the number of computed tokens from which its service is to be looked at.
        seen: the first step that could start it.
        failures: how often somebody made way for it in vain since it last started.
    """

    __slots__ = ("cached", "call", "failures", "mark", "not_before", "outputs", "prompt", "request", "seen")

    def __init__(self, request: Any, call: PlasCall, seen: int) -> None:
        self.request = request
        self.call = call
        self.seen = seen
        self.cached: int | None = None
        self.mark: float = inf
        self.prompt = 0  # prompt tokens charged
        self.outputs = 0  # output tokens charged
        self.failures = 0
        self.not_before = 0

    def new_service(self) -> int:
        """Service units since the last time. What is computed again after a preemption is charged once."""
        computed: int = min(self.request.num_computed_tokens, self.request.num_prompt_tokens)
        prompt = computed - (self.cached or 0)
        outputs: int = self.request.num_output_tokens
        new = _PROMPT_UNITS * max(prompt - self.prompt, 0) + _OUTPUT_UNITS * max(outputs - self.outputs, 0)
        self.prompt, self.outputs = max(self.prompt, prompt), max(self.outputs, outputs)
        return new

    def set_mark(self, left: float) -> None:
        """Notes how many tokens are computed, at the earliest, when so much more service has been used."""
        if left == inf:
            self.mark = inf
            return
        prompt_end = self.request.num_prompt_tokens
        uncharged = prompt_end - (self.cached or 0) - self.prompt
        if left <= _PROMPT_UNITS * uncharged:
            self.mark = (self.cached or 0) + self.prompt + left / _PROMPT_UNITS
            return
        outputs = self.outputs + ceil((left - _PROMPT_UNITS * max(uncharged, 0)) / _OUTPUT_UNITS)
        self.mark = prompt_end + outputs - 1
