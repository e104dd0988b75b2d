"""A call's program, as the scheduler in vLLM's engine process sees it. Needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from rsm.broker.settings import Settings
from rsm.workers.scheduling.plas import PlasCall, PlasRules
from rsm.workers.scheduling.service import ServiceUnit, Tokens, Used, charge

LEVELS = 16  # levels of the router's queues that fit between two of vLLM's priorities

_CHECK_STEPS = 16  # steps between two checks of a call's service, in a unit whose growth cannot be predicted


# The scheduler's key in vLLM's `additional_config`.
CONFIG_KEY = "rsm"


def rules_of(settings: Settings) -> PlasRules:
    return PlasRules(bounds=settings.level_bounds, beta=settings.starvation_beta, prompt_chunk=settings.prompt_chunk)


def as_config(settings: Settings) -> dict[str, Any]:
    """The settings that the scheduler in the engine process needs, as JSON values."""
    return {
        "level_bounds": list(settings.level_bounds),
        "starvation_beta": settings.starvation_beta,
        "prompt_chunk": settings.prompt_chunk,
        "service_unit": settings.service_unit,
    }


def from_config(vllm_config: Any) -> Settings:
    """Reads these settings back in the engine process; defaults for those that are missing."""
    ours = getattr(vllm_config, "additional_config", None)
    given = dict(ours.get(CONFIG_KEY, {}).get("settings", {})) if isinstance(ours, dict) else {}
    if "level_bounds" in given:
        given["level_bounds"] = tuple(given["level_bounds"])
    return Settings.model_construct(**given)


@dataclass(frozen=True, slots=True)
class Program:
    """A call's program, passed to the scheduler in the engine by extra_args. `priority` encodes class and level.

    Attributes:
        program_id: the program.
        program_service: service units that it has used.
        program_waited_ms: how long it has waited in total.
        program_ran_ms: how long it has run in total.
    """

    program_id: str
    program_service: int = 0
    program_waited_ms: int = 0
    program_ran_ms: int = 0

    @classmethod
    def of_request(cls, request: Any) -> Program:
        """Reads the program of a request from any source. A missing or non-numeric value counts as 0."""
        params = getattr(request, "sampling_params", None)
        given: dict[str, Any] = getattr(params, "extra_args", None) or {}
        numbers = [given.get(f"program_{name}") for name in ("service", "waited_ms", "ran_ms")]
        known = (max(int(n), 0) if isinstance(n, int | float) else 0 for n in numbers)
        return cls(str(given.get("program_id", "")) or request.request_id, *known)


class Tracked:
    """A vLLM request and what it has used. Times in seconds.

    Attributes:
        check_at: the step in which its service is checked while it runs; 0 = never.
        seen: the first step that could start it.
        failures: preemptions for its sake, since it last started, that did not let it start.
        not_before: the first step in which a call may be preempted for it.
    """

    __slots__ = (
        "_charged",
        "_first_s",
        "_outputs",
        "_prompt",
        "_ran_s",
        "_started",
        "cached",
        "call",
        "check_at",
        "failures",
        "not_before",
        "request",
        "seen",
    )

    def __init__(self, request: Any, call: PlasCall, seen: int) -> None:
        self.request = request
        self.call = call
        self.seen = seen
        self.cached: int | None = None  # prompt tokens found in the cache when it first started; None: it has not
        self.check_at = self.failures = self.not_before = 0
        self._charged = 0  # service units
        # The most that was ever computed, because tokens recomputed after a preemption cost the program nothing.
        self._prompt = self._outputs = 0
        self._ran_s = self._started = 0.0
        self._first_s: float | None = None

    def starts(self, cached: int, now: float) -> None:
        """The request starts to run, with `cached` of its tokens in the cache."""
        self.failures, self._started = 0, now
        if self.cached is None:
            self.cached = self._prompt = min(cached, self.request.num_prompt_tokens)

    def stops(self, now: float) -> None:
        self._ran_s += now - self._started

    def new_service(self, unit: ServiceUnit, now: float) -> int:
        """The service units of a running call since the last charge."""
        request, ran_s = self.request, self._ran_s + now - self._started
        self._prompt = max(self._prompt, min(request.num_computed_tokens, request.num_prompt_tokens))
        self._outputs = max(self._outputs, request.num_output_tokens)
        if self._outputs and self._first_s is None:
            self._first_s = ran_s
        used = Used(self._prompt, self._outputs, self.cached or 0, ran_s, self._first_s)
        new = max(charge(unit, used) - self._charged, 0)
        self._charged += new
        return new

    def steps_until(self, unit: ServiceUnit, left: float, step_tokens: int, decode_tokens: int) -> int:
        """The fewest steps, at least 1, after which it can have used `left` more service units.

        Args:
            step_tokens: the most tokens in one step.
            decode_tokens: the most tokens of a decoding call in one step.
        """
        if type(unit) is not Tokens:
            return _CHECK_STEPS
        request = self.request
        prompt: int = request.num_prompt_tokens
        uncharged = prompt - self._prompt
        # The step that computes the last token of the prompt also yields the first token of the answer.
        answered = prompt + self._outputs + ceil((left - uncharged) / 2) - 1
        mark = self._prompt + left if left <= uncharged else answered
        computed: int = request.num_computed_tokens
        pace = decode_tokens if computed + 1 >= request.num_tokens else step_tokens
        return max(ceil((mark - computed) / pace), 1)
