"""An engine's speed estimated from its calls, for engines that do not report their steps.

The total cost of calls is estimated as well as from steps. But with many concurrent calls, part of the cost of prompts
is attributed to steps. No clock: time is an argument, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rsm.broker.protocol.snapshot import Speed
from rsm.workers.meters.speed import PRIOR, Mean, SpeedMeter


class _Stretch(NamedTuple):
    seconds: float
    steps: int
    prompts: float
    batch: float


@dataclass(slots=True)
class _Stage:
    """The start of a call's prefill or decode phase, on the meter's counters."""

    since: float
    prompts: float
    load: float


class CallMeter:
    """Measures speed and answer lengths from the starts, first tokens and ends of calls, for any engine.

    The stretches of concurrent calls overlap, and each includes the others' prompts and tokens.
    """

    def __init__(self, half_life_s: float = 60.0, prior: Speed = PRIOR) -> None:
        self.meter = SpeedMeter(half_life_s, prior)
        self._completion = Mean()
        self._running = 0
        self._at = 0.0
        self._load = 0.0  # calls x seconds so far
        self._prompts = 0.0  # prompt tokens computed so far

    @property
    def completion_tokens(self) -> float:
        """The recent mean length of answers; 0 = there were none."""
        return self._completion.value

    def begin(self, now: float) -> Begun:
        """A call was submitted to the engine."""
        self._tick(now)
        self._running += 1
        return Begun(self, _Stage(self._at, self._prompts, self._load))

    def _tick(self, now: float) -> None:
        self._load += self._running * max(0.0, now - self._at)
        self._at = max(now, self._at)

    def _pass(self, now: float, stage: _Stage, prompt_tokens: float, steps: int) -> tuple[_Stretch, _Stage]:
        """Moves a call to its next stage after `steps` steps, in each of which all calls got a token."""
        self._tick(now)
        self._prompts += prompt_tokens
        seconds = self._at - stage.since
        batch = max((self._load - stage.load) / seconds, 1.0) if seconds > 0 else 1.0
        stretch = _Stretch(seconds, steps, self._prompts - stage.prompts, batch)
        return stretch, _Stage(self._at, self._prompts, self._load)

    def _learn(self, s: _Stretch) -> None:
        if s.steps > 0:
            self.meter.add(s.seconds, s.steps, max(0.0, s.prompts), s.steps * s.batch, 1 / s.batch)

    def _leave(self, completion_tokens: int | None) -> None:
        self._running -= 1
        if completion_tokens is not None:
            self._completion.add(completion_tokens)


class Begun:
    """One call in the engine."""

    __slots__ = ("_done", "_guess", "_meter", "_prefill", "_stage")

    def __init__(self, meter: CallMeter, stage: _Stage) -> None:
        self._meter = meter
        self._stage = stage
        self._prefill: _Stretch | None = None  # set by its first token
        self._guess = 0.0  # the guessed number of its prompt tokens to compute
        self._done = False

    def first(self, now: float, prompt_tokens: float) -> None:
        """The first token has arrived. `prompt_tokens`: a guess of how many the engine had to compute."""
        if self._prefill is None and not self._done:
            self._guess = prompt_tokens
            self._prefill, self._stage = self._meter._pass(now, self._stage, prompt_tokens, 1)

    def end(self, now: float, prompt_tokens: float, completion_tokens: int, whole: bool = True) -> None:
        """The call has left the engine. `whole`: it was not stopped, so its length counts."""
        if self._done:
            return
        self._done = True
        wrong = prompt_tokens - self._guess
        if self._prefill is None:
            self._meter._learn(self._meter._pass(now, self._stage, wrong, completion_tokens)[0])
        else:
            self._meter._learn(self._prefill._replace(prompts=self._prefill.prompts + wrong))
            self._meter._learn(self._meter._pass(now, self._stage, 0.0, completion_tokens - 1)[0])
            self._meter._prompts += wrong
        self._meter._leave(completion_tokens if whole else None)
