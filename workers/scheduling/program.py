"""A call's program, as the scheduler in vLLM's engine process knows it. Needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from rsm.broker.settings import Settings
from rsm.workers.scheduling.plas import PlasCall, PlasRules
from rsm.workers.scheduling.service import ServiceUnit, Tokens, Used, charge

LEVELS = 16  # levels of the router's queues that fit between two of vLLM's priorities

_LOOK_AGAIN = 16  # steps after which a call's service is looked at, in a unit of which nothing more is known


# Where in vLLM's `additional_config` our scheduler finds what it must know.
CONFIG_KEY = "rsm"


def rules_of(settings: Settings) -> PlasRules:
    return PlasRules(bounds=settings.level_bounds, beta=settings.starvation_beta, prompt_chunk=settings.prompt_chunk)


def as_config(settings: Settings) -> dict[str, Any]:
    """What of the settings the scheduler in the engine's process must know, as JSON can hold it."""
    return {
        "level_bounds": list(settings.level_bounds),
        "starvation_beta": settings.starvation_beta,
        "prompt_chunk": settings.prompt_chunk,
        "service_unit": settings.service_unit,
    }


def from_config(vllm_config: Any) -> Settings:
    """Those settings, read back in the engine's process; defaults for what nobody has named."""
    ours = getattr(vllm_config, "additional_config", None)
    given = dict(ours.get(CONFIG_KEY, {}).get("settings", {})) if isinstance(ours, dict) else {}
    if "level_bounds" in given:
        given["level_bounds"] = tuple(given["level_bounds"])
    return Settings.model_construct(**given)


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
    def of_request(cls, request: Any) -> Program:
        """Of a request that anybody may have made: whatever is not there, or no number, counts as 0."""
        params = getattr(request, "sampling_params", None)
        given: dict[str, Any] = getattr(params, "extra_args", None) or {}
        numbers = [given.get(f"program_{name}") for name in ("service", "waited_ms", "ran_ms")]
        known = (max(int(n), 0) if isinstance(n, int | float) else 0 for n in numbers)
        return cls(str(given.get("program_id", "")) or request.request_id, *known)


class Tracked:
    """One request of vLLM's, and what it has used. Times in s.

    Attributes:
        look_at: the step in which its service is to be looked at while it runs; 0 = not at all.
        seen: the first step that could start it.
        failures: how often somebody made way for it in vain since it last started.
        not_before: the first step in which somebody may make way for it.
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
        "failures",
        "look_at",
        "not_before",
        "request",
        "seen",
    )

    def __init__(self, request: Any, call: PlasCall, seen: int) -> None:
        self.request = request
        self.call = call
        self.seen = seen
        self.cached: int | None = None  # prompt tokens found in the cache when it first started; None: it has not
        self.look_at = self.failures = self.not_before = 0
        self._charged = 0  # service units
        # The most that was ever computed: what is computed again after a preemption costs its program nothing.
        self._prompt = self._outputs = 0
        self._ran_s = self._started = 0.0
        self._first_s: float | None = None

    def starts(self, cached: int, now: float) -> None:
        """It runs from now on; so many of its tokens were in the cache."""
        self.failures, self._started = 0, now
        if self.cached is None:
            self.cached = self._prompt = min(cached, self.request.num_prompt_tokens)

    def stops(self, now: float) -> None:
        self._ran_s += now - self._started

    def new_service(self, unit: ServiceUnit, now: float) -> int:
        """Service units of a running call since the last time."""
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
        """In how many steps it can have used so much more service, at the earliest; at least 1.

        Args:
            step_tokens: most tokens of one step.
            decode_tokens: most tokens of one step of a call that decodes.
        """
        if type(unit) is not Tokens:
            return _LOOK_AGAIN
        request = self.request
        prompt: int = request.num_prompt_tokens
        uncharged = prompt - self._prompt
        # With the last token of the prompt comes the first of the answer.
        answered = prompt + self._outputs + ceil((left - uncharged) / 2) - 1
        mark = self._prompt + left if left <= uncharged else answered
        computed: int = request.num_computed_tokens
        pace = decode_tokens if computed + 1 >= request.num_tokens else step_tokens
        return max(ceil((mark - computed) / pace), 1)
