"""Service units: the cost of a call as one number. The sum over a program's calls gives its level (programs.lua).

All workers of a namespace must use the same unit, and RSM_LEVEL_BOUNDS must be in that unit. With a unit that does not
depend on load, a program reaches the same levels on any engine. Time depends on load, but it is the paper's unit.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from inspect import isabstract

from rsm.broker.errors import InvalidRequest

log = logging.getLogger("rsm.worker")

_MOST = float(1 << 50)  # sums of such numbers are exact in a double


@dataclass(frozen=True, slots=True)
class Used:
    """What a call has used, at its end or so far.

    Attributes:
        cached_tokens: prompt tokens found in the cache.
        ran_s: seconds in the engine's batch; seconds in the engine, if it does not report when the call began to run.
        first_s: seconds of `ran_s` until the first token; None if there was none or it is unknown.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    ran_s: float = 0.0
    first_s: float | None = None


class ServiceUnit(ABC):
    """The cost of a call. A subclass has one method and no state, because many workers charge calls."""

    @abstractmethod
    def service(self, used: Used) -> float:
        """The service of one call: at least 0, and never less when the call has used more."""


class Tokens(ServiceUnit):
    """Uncached prompt tokens + 2 x completion tokens: the weights of VTC (arXiv 2401.00588) and llm-d.

    Independent of load. A lost cache counts only through the prompt tokens that are computed again.
    """

    def service(self, used: Used) -> float:
        return max(0, used.prompt_tokens - used.cached_tokens) + 2 * used.completion_tokens


class Work(ServiceUnit):
    """2 x (completion tokens + 1/8 of the uncached prompt tokens): about what they cost an engine.

    A step computes thousands of prompt tokens, but one completion token per call. With an 8B model on an H100, a prompt
    token takes about 36 us; a completion token takes 0.2 to 0.3 ms in a batch of 64 with contexts of 2,000.
    """

    def service(self, used: Used) -> float:
        return max(0, used.prompt_tokens - used.cached_tokens) / 4 + 2 * used.completion_tokens


class Time(ServiceUnit):
    """Milliseconds in the engine's batch: the paper's unit. The same call takes longer in a larger batch."""

    def service(self, used: Used) -> float:
        return 1000 * used.ran_s


class KvTokens(ServiceUnit):
    """Token-seconds of KV cache: Justitia's cost of an agent (arXiv 2510.17015).

    The prompt occupies the cache from the start. The answer grows evenly after the first token, so it occupies half of
    its size on average. Each of several prompts with a common prefix pays for the whole prefix.
    """

    def service(self, used: Used) -> float:
        answering_s = used.ran_s - min(used.first_s or 0.0, used.ran_s)
        return used.prompt_tokens * used.ran_s + used.completion_tokens * answering_s / 2


def charge(unit: ServiceUnit, used: Used) -> int:
    """The service of a call as reported to Redis, a whole number. If the unit fails, the call is charged nothing."""
    try:
        return round(min(max(0.0, unit.service(used)), _MOST))
    except Exception as e:
        log.error("service unit %s raised %s; the call is charged nothing", type(unit).__name__, type(e).__name__)
        return 0


UNITS: dict[str, type[ServiceUnit]] = {"tokens": Tokens, "work": Work, "time": Time, "kv": KvTokens}


def create_unit(name: str) -> ServiceUnit:
    """Creates the unit of that name: a built-in one, or the class at `package.module:Class`.

    Raises:
        InvalidRequest: there is no such unit; the message lists the names.
    """
    if name in UNITS:
        return UNITS[name]()
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as e:  # the last two: the name is no module path
        raise InvalidRequest(
            f"There is no service unit {name!r} ({e}). Use one of {', '.join(UNITS)}, or package.module:Class "
            "(RSM_SERVICE_UNIT)."
        ) from e
    if not (isinstance(found, type) and issubclass(found, ServiceUnit)) or isabstract(found):
        raise InvalidRequest(
            f"{name!r} is not a subclass of rsm.workers.ServiceUnit with a method `service` (RSM_SERVICE_UNIT)."
        )
    return found()
