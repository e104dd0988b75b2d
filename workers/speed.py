"""How fast an engine is, learned while it works. No clock: time goes in as numbers, in seconds.

A step of an engine with continuous batching costs

    step_s + token_s x (prompt tokens it computes) + seq_s x (calls that get a token in it),

and many steps cost the sum. `SpeedMeter` finds the three by least squares over whatever stretches of work it is told
of, long or short, newer ones counting more. `CallMeter` makes such stretches of what a worker sees of its calls, for
engines that say nothing of their steps: what calls cost in all it finds as well, but with many of them at once it takes
some of what prompts cost for a cost of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from broker.messages import Speed

# Until something was measured: an 8B model on a large GPU, by order of magnitude.
PRIOR = Speed(step_s=0.01, token_s=100e-6, seq_s=50e-6)
# How much the last estimate weighs beside the work at hand, of which it decides what that work does not show.
_DAMPING = 1e-3
# A stretch that took so many times as long as expected counts less (Huber, 1964): kernels compiled on first use, a
# process that stood still. One that is off by more than that moves the estimate no further than one that is just so.
_OUTLIER = 4.0
# What has to be seen before an estimate is one.
_ENOUGH_S = 0.05
_FEWEST = 0.01
# After how much more work the estimate is made anew, as a share of all that was seen, and at most.
_ANEW, _ANEW_S = 0.05, 0.5

_Matrix = list[list[float]]


class SpeedMeter:
    """Least squares with forgetting, each stretch weighted by 1 / expected time, none of the three below zero.

    Args:
        half_life_s: seconds of work after which what was seen counts half, but never fewer than a hundred stretches.
            Idle time forgets nothing.
    """

    def __init__(self, half_life_s: float = 60.0, prior: Speed = PRIOR) -> None:
        self._half_life_s = half_life_s
        self._speed = prior
        # Sums over stretches of the product of each two of: steps, prompt tokens, tokens out, seconds. They age.
        self._ss = self._sp = self._so = self._pp = self._po = self._oo = 0.0
        self._st = self._pt = self._ot = 0.0
        self._seconds = 0.0
        self._prompts = self._outputs = 0.0
        self._anew_at = 0.0

    def add(self, seconds: float, steps: float, prompt_tokens: float, tokens_out: float, weight: float = 1.0) -> None:
        """A stretch of work: so many steps took so long. `tokens_out` counts one for each call in each step.

        weight: less than 1 for stretches that others overlap.
        """
        if seconds <= 0 or steps + prompt_tokens + tokens_out <= 0:
            return
        old = self._speed
        expected = steps * old.step_s + prompt_tokens * old.token_s + tokens_out * old.seq_s or seconds
        kept: float = 0.5 ** (weight * min(seconds / self._half_life_s, _FEWEST))
        if seconds > _OUTLIER * expected and self.measured:
            weight *= _OUTLIER * expected / seconds
        weight /= expected
        s, p, o = weight * steps, weight * prompt_tokens, weight * tokens_out
        self._ss = kept * self._ss + s * steps
        self._sp = kept * self._sp + s * prompt_tokens
        self._so = kept * self._so + s * tokens_out
        self._st = kept * self._st + s * seconds
        self._pp = kept * self._pp + p * prompt_tokens
        self._po = kept * self._po + p * tokens_out
        self._pt = kept * self._pt + p * seconds
        self._oo = kept * self._oo + o * tokens_out
        self._ot = kept * self._ot + o * seconds
        self._seconds += seconds
        self._prompts += prompt_tokens
        self._outputs += tokens_out
        if self._seconds >= self._anew_at:
            self._speed = self._solved()
            self._anew_at = self._seconds + min(_ANEW * self._seconds, _ANEW_S)

    @property
    def measured(self) -> bool:
        """Whether it has seen enough to say anything: some prompts, some output."""
        return self._seconds > _ENOUGH_S and self._prompts > 0 and self._outputs > 0

    @property
    def speed(self) -> Speed:
        """The estimate; the prior where nothing was seen. May be read from any thread."""
        return self._speed

    def _solved(self) -> Speed:
        """What the work does not tell apart (the fixed part of a step from that of a call, while always as many run)
        stays as it was."""
        last = (self._speed.step_s, self._speed.token_s, self._speed.seq_s)
        products = [[self._ss, self._sp, self._so], [self._sp, self._pp, self._po], [self._so, self._po, self._oo]]
        times = [self._st, self._pt, self._ot]
        for i in range(3):
            damping = _DAMPING * products[i][i]
            products[i][i] += damping
            times[i] += damping * last[i]
        return Speed(*_non_negative(products, times, last))


def _non_negative(a: _Matrix, b: list[float], last: tuple[float, ...]) -> list[float]:
    """Solves a x = b by least squares under x >= 0, the most negative one set to zero first. A row of zeros says
    nothing: its unknown stays as it was."""
    x = [old if a[i][i] <= 0 else 0.0 for i, old in enumerate(last)]
    free = [i for i in range(len(b)) if a[i][i] > 0]
    while free:
        found = _solve([[a[i][j] for j in free] for i in free], [b[i] for i in free])
        worst = min(range(len(free)), key=found.__getitem__)
        if found[worst] >= 0:
            for i, value in zip(free, found, strict=True):
                x[i] = value
            break
        del free[worst]
    return x


def _solve(a: _Matrix, b: list[float]) -> list[float]:
    """Gaussian elimination; `a` is positive definite, so no pivoting is needed."""
    n = len(b)
    for k in range(n):
        for i in range(k + 1, n):
            factor = a[i][k] / a[k][k]
            for j in range(k, n):
                a[i][j] -= factor * a[k][j]
            b[i] -= factor * b[k]
    for k in reversed(range(n)):
        b[k] = (b[k] - sum(a[k][j] * b[j] for j in range(k + 1, n))) / a[k][k]
    return b


class Mean:
    """The mean of late: the last `n` values or so count."""

    def __init__(self, n: float = 50.0) -> None:
        self._n = n
        self._count = 0.0
        self.value = 0.0

    def add(self, value: float) -> None:
        self._count = min(self._count + 1, self._n)
        self.value += (value - self.value) / self._count


class _Stretch(NamedTuple):
    seconds: float
    steps: int
    prompts: float
    batch: float


@dataclass(slots=True)
class _Stage:
    """A call in the engine: where it began to be computed, or had its first token, on the meter's counters."""

    since: float
    prompts: float
    load: float


class CallMeter:
    """Speed and lengths, from the beginnings, first tokens and ends of calls, whatever engine runs them.

    The stretches of calls that run together overlap, and each sees the others' prompts and tokens.
    """

    def __init__(self, half_life_s: float = 60.0, prior: Speed = PRIOR) -> None:
        self.meter = SpeedMeter(half_life_s, prior)
        self._completion = Mean()
        self._running = 0
        self._at = 0.0
        self._load = 0.0  # calls x seconds so far
        self._prompts = 0.0  # prompt tokens that were computed so far

    @property
    def completion_tokens(self) -> float:
        """How long answers were of late, in the mean; 0 = none was seen."""
        return self._completion.value

    def begin(self, now: float) -> Begun:
        """A call was handed to the engine."""
        self._tick(now)
        self._running += 1
        return Begun(self, _Stage(self._at, self._prompts, self._load))

    def _tick(self, now: float) -> None:
        self._load += self._running * max(0.0, now - self._at)
        self._at = max(now, self._at)

    def _pass(self, now: float, stage: _Stage, prompt_tokens: float, steps: int) -> tuple[_Stretch, _Stage]:
        """A call has come from a stage to its next one, in so many steps, in each of which all calls got a token."""
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
        self._prefill: _Stretch | None = None  # once its first token is out
        self._guess = 0.0  # of its prompt's tokens
        self._done = False

    def first(self, now: float, prompt_tokens: float) -> None:
        """Its first token is out. `prompt_tokens`: a guess of those that the engine had to compute."""
        if self._prefill is None and not self._done:
            self._guess = prompt_tokens
            self._prefill, self._stage = self._meter._pass(now, self._stage, prompt_tokens, 1)

    def end(self, now: float, prompt_tokens: float, completion_tokens: int, whole: bool = True) -> None:
        """It has left the engine. `whole`: by itself, so that its length says something of others."""
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


class StepWindow:
    """Gathers steps of an engine whose reports tell a long prompt's tokens only with its last step."""

    def __init__(self, meter: SpeedMeter, least_s: float = 2.0) -> None:
        self._meter = meter
        self._least_s = least_s
        self._sums = [0.0] * 4

    def add(self, seconds: float, prompt_tokens: int, tokens_out: int) -> None:
        """One step."""
        for i, value in enumerate((seconds, 1.0, prompt_tokens, tokens_out)):
            self._sums[i] += value
        if self._sums[0] >= self._least_s:
            self.flush()

    def flush(self) -> None:
        """The engine has no more to do, so no prompt is half done; or the window is full."""
        self._meter.add(*self._sums)
        self._sums = [0.0] * 4
