"""Service units: what a call has cost, as one number. Programs are put into levels by the sum of it (programs.lua).

All workers of a namespace must use the same unit, and RSM_LEVEL_BOUNDS must be in it. A unit that does not depend on
how busy the engine is puts a program into the same levels on any engine; time does not, but the paper counts it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from inspect import isabstract

from rsm.broker.errors import InvalidRequest

log = logging.getLogger("rsm.worker")

_MOST = float(1 << 50)  # sums of it are exact in a double


@dataclass(frozen=True, slots=True)
class Used:
    """What a call has used of an engine, at its end or so far.

    Attributes:
        cached_tokens: of the prompt, not computed again.
        ran_s: seconds in the engine's batch, or in the engine if it does not say since when it ran.
        first_s: seconds of these until the first token; None: there was none, or nobody knows.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    ran_s: float = 0.0
    first_s: float | None = None


class ServiceUnit(ABC):
    """One method; it holds no state, for calls are charged by many workers."""

    @abstractmethod
    def service(self, used: Used) -> float:
        """The service of one call: at least 0, and never less than it was when the call had used less."""


class Tokens(ServiceUnit):
    """Uncached tokens of the prompt + 2 x tokens of the answer: the weights of VTC (arXiv 2401.00588) and llm-d.

    Independent of load, and of a cache that was lost only as far as the prompt had to be computed again.
    """

    def service(self, used: Used) -> float:
        return max(0, used.prompt_tokens - used.cached_tokens) + 2 * used.completion_tokens


class Work(ServiceUnit):
    """Tokens of the answer + an eighth of the uncached tokens of the prompt, times 2: about what they cost an engine.

    Prompts are computed thousands of tokens at a time, answers a token of each call at a time: of an 8B model on an
    H100 a prompt token takes about 36 us, and an answer token in a batch of 64 with contexts of 2,000 0.2 to 0.3 ms.
    """

    def service(self, used: Used) -> float:
        return max(0, used.prompt_tokens - used.cached_tokens) / 4 + 2 * used.completion_tokens


class Time(ServiceUnit):
    """Milliseconds in the engine's batch: the paper's unit. The same call takes longer among many."""

    def service(self, used: Used) -> float:
        return 1000 * used.ran_s


class KvTokens(ServiceUnit):
    """Token-seconds of KV cache: Justitia's cost of an agent (arXiv 2510.17015).

    The prompt is held from the beginning, and the answer grows evenly after the first token, so half of it is held in
    the mean. Prompts that share their cache pay for it each.
    """

    def service(self, used: Used) -> float:
        answering_s = used.ran_s - min(used.first_s or 0.0, used.ran_s)
        return used.prompt_tokens * used.ran_s + used.completion_tokens * answering_s / 2


def charge(unit: ServiceUnit, used: Used) -> int:
    """What Redis is told of a call: a whole number. A unit that fails on a call costs nobody the call's answer."""
    try:
        return round(min(max(0.0, unit.service(used)), _MOST))
    except Exception as e:
        log.error("service unit %s: %s; the call is charged with nothing", type(unit).__name__, type(e).__name__)
        return 0


UNITS: dict[str, type[ServiceUnit]] = {"tokens": Tokens, "work": Work, "time": Time, "kv": KvTokens}


def create_unit(name: str) -> ServiceUnit:
    """The unit of that name: one of ours, or `package.module:Class` of anybody's.

    Raises:
        InvalidRequest: there is no such unit; the message lists the names.
    """
    if name in UNITS:
        return UNITS[name]()
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as e:  # the last two: no module path at all
        raise InvalidRequest(
            f"There is no service unit {name!r} ({e}). Use one of {', '.join(UNITS)}, or package.module:Class "
            "(RSM_SERVICE_UNIT)."
        ) from e
    if not (isinstance(found, type) and issubclass(found, ServiceUnit)) or isabstract(found):
        raise InvalidRequest(f"{name!r} is not a subclass of rsm.workers.ServiceUnit with a method `service`.")
    return found()
