"""A producer's plans. They depend only on the seed, the producer's place and the call's number, so deaths do not change
them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

SIM_MODEL = "sim-8b"


class Act(StrEnum):
    """What the producer does with a call besides waiting. The values are keys in bench/results/chaos-*.json."""

    WAIT = "wait"
    CANCEL = "cancel"
    CANCEL_SESSION = "cancel session"
    AWAY = "go away and come back"
    TWICE = "push twice"
    DEADLINE = "deadline"


# Weights. Most calls are ordinary, so that faults have work to disturb.
_ACTS = {Act.WAIT: 8, Act.CANCEL: 3, Act.CANCEL_SESSION: 1, Act.AWAY: 3, Act.TWICE: 2, Act.DEADLINE: 1}
_SESSION_CALLS = 3
_SESSIONS = 8
_LONG = 300


@dataclass(frozen=True, slots=True)
class Plan:
    """One call, and what its producer does with it.

    Attributes:
        after: number of chunks (without streaming: tenths of a second) before the producer acts.
        deadline_s: seconds from the push, on Redis's clock; 0: none.
    """

    id: str
    session: str
    prompt: str
    max_tokens: int
    model: str
    stream: bool
    act: Act
    after: int
    deadline_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Plan:
        """Reads `as_json` back."""
        return cls(**{**found, "act": Act(found["act"])})


@dataclass(frozen=True, slots=True)
class Pool:
    """Prompts for a real engine. Its answers cannot be computed, so they are recorded before the first fault."""

    model: str
    prompts: tuple[str, ...]
    max_tokens: int


def is_real(number: int) -> bool:
    """Tells whether the calls of this number go to the real engine, if there is one."""
    return number % 2 == 1


def draw(seed: int, place: int, number: int, pool: Pool | None = None) -> list[Plan]:
    """Draws the calls that a producer pushes together under one number: a single one, or a session to cancel.

    Args:
        pool: prompts for the real engine; half of the numbers use them.
    """
    rng = random.Random(f"{seed}/{place}/{number}")
    act = rng.choices(list(_ACTS), weights=list(_ACTS.values()))[0]
    name = f"p{place}-{number}"
    if act is Act.CANCEL_SESSION:
        return [_plan(rng, f"{name}.{i}", name, act, None) for i in range(_SESSION_CALLS)]
    session = name if rng.random() < 0.3 else f"s{place}-{rng.randrange(_SESSIONS)}"
    return [_plan(rng, name, session, act, pool if is_real(number) else None)]


def _plan(rng: random.Random, name: str, session: str, act: Act, pool: Pool | None) -> Plan:
    prompt, tokens, model = f"prompt {name} {rng.randrange(1 << 30)}", rng.randint(4, 60), SIM_MODEL
    if act in (Act.CANCEL, Act.CANCEL_SESSION):
        tokens = _LONG  # so that an engine that ignores the cancel is noticed
    if pool is not None:
        prompt, tokens, model = rng.choice(pool.prompts), pool.max_tokens, pool.model
    deadline = rng.choice((0.3, 1.0, 30.0)) if act is Act.DEADLINE else 0.0
    return Plan(name, session, prompt, tokens, model, rng.random() < 0.6, act, rng.randint(0, 12), deadline)
