"""The pure core of program-aware scheduling inside one engine. No engine and no clock: time is an argument, in seconds.

It is the scheduler of Autellix (arXiv 2502.13965, section 4.2, Algorithm 1, lines 8 to 36), for an engine that can
preempt running calls. A call begins in the level of its program's service, not in the best level:

1. Its level is the bin of the service that its program had (`inherited`) plus the service that it used itself.
2. Each level has a budget of service, its quantum. A call that has used it up drops one level, even while it runs.
3. A starving call moves to the best level of its class: (program's wait + call's wait) / (program's run + call's run)
   >= beta. Its counters are then reset. Beyond the paper, this call's copy of the program's counters is reset too, as
   in the broker's queues (`programs.lua`); otherwise a program that starved once would be promoted on every call until
   its run time has caught up. The program's other calls keep their counters and are promoted soon after.
4. Order: the user's priority class, then the level, then the arrival.
5. A waiting call may preempt a running one that is strictly worse by class and level. So calls of the same level never
   take turns, and each exchange costs its cause a level or its victim a wait.
6. Beyond the paper: while a better call runs, a worse call's prompt is computed in chunks (`prompt_chunk`).

The owner of a `Plas` reports what happens (`add`, `start`, `charge`, `stop`, `end`) and asks what to do (`promote`,
`victims`). The cost per engine step does not grow with the running calls: `charge` may wait until `until_demotion`
units have accumulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf, isfinite

from rsm.broker.protocol.rules import RUN_FLOOR_MS, level_of

_SPARE = 64  # stale entries that the heap may have, beyond as many as it has valid ones

Rank = tuple[int, int]  # class and level; lower is better
NOTHING_IS_BETTER: Rank = (-(1 << 31), 0)
Order = tuple[int, int, float, int]  # class, level, arrival, number


@dataclass(frozen=True, slots=True, kw_only=True)
class PlasRules:
    """The parameters that the paper leaves open.

    Attributes:
        bounds: upper bounds of the levels, in service units; one more level is above them.
        quanta: service units that a call may use in each level. Default: the rest of the level's bin.
        beta: the ratio of wait to run time at which a program starves; 0 = never.
        floor_s: the least run time that counts; without it, a new program would starve at once.
        most_victims: the most calls preempted in one step.
        prompt_chunk: the most prompt tokens per step of a call while a better one runs; 0 = no limit.
    """

    bounds: tuple[int, ...] = (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)
    quanta: tuple[int, ...] = ()
    beta: float = 8.0
    floor_s: float = RUN_FLOOR_MS / 1000
    most_victims: int = 8
    prompt_chunk: int = 512

    def __post_init__(self) -> None:
        if list(self.bounds) != sorted(set(self.bounds)) or min(self.bounds, default=1) <= 0:
            raise ValueError("bounds must be positive and increasing")
        if self.quanta and (len(self.quanta) != len(self.bounds) or min(self.quanta) <= 0):
            raise ValueError("quanta must be positive, one for each bound")
        if not (isfinite(self.beta) and self.beta >= 0 and self.floor_s > 0 and self.most_victims >= 0):
            raise ValueError(
                "beta and most_victims must not be negative, beta must be finite, floor_s must be positive"
            )
        if self.prompt_chunk < 0:
            raise ValueError("prompt_chunk must not be negative")

    def level_of(self, service: float) -> int:
        """The level of an amount of service; 0 is the best."""
        return level_of(service, self.bounds)

    def budget(self, level: int, service: float = 0.0) -> float:
        """Service units that a call may use in a level that it enters with `service`; inf in the last level."""
        if level >= len(self.bounds):
            return inf
        if self.quanta:
            return self.quanta[level]
        return self.bounds[level] - max(service, self.bounds[level - 1] if level else 0)

    def prompt_tokens(self, most: int, better_runs: bool) -> int:
        """The most prompt tokens of a call in one step. All calls wait for the end of a step, so a whole step (`most`)
        for a worse call's prompt would make a better call's next token take 20 to 40 times as long."""
        return min(most, self.prompt_chunk) if better_runs and self.prompt_chunk else most


class PlasCall:
    """A call in the core. Only `Plas` writes to it.

    Attributes:
        own: service units used by the call itself.
        level: 0 is the best.
        order: the sort key, the best first; changes with the level.
        promotions: how often it was promoted because it starved.
    """

    __slots__ = (
        "_due",
        "_left",
        "_number",
        "_ran",
        "_running",
        "_since",
        "_waited",
        "arrival",
        "inherited",
        "level",
        "order",
        "own",
        "priority",
        "program",
        "promotions",
    )

    def __init__(self, program: str, priority: int, inherited: float, arrival: float, number: int) -> None:
        self.program = program
        self.priority = priority
        self.inherited = inherited
        self.arrival = arrival
        self.own = 0.0
        self.promotions = 0
        self.level = 0
        self.order: Order = (priority, 0, arrival, number)
        self._number = number
        self._left = inf  # what is left of the level's budget
        # Seconds of the program before this call, plus those of the call up to `_since`, since the last promotion.
        self._waited = self._ran = 0.0
        self._since = arrival
        self._running = False
        self._due: float = inf  # when it will starve if it waits until then

    def __repr__(self) -> str:
        state = "runs" if self._running else "waits"
        return f"PlasCall({self.program}, class {self.priority}, level {self.level}, {state})"

    @property
    def rank(self) -> Rank:
        return self.priority, self.level

    @property
    def running(self) -> bool:
        return self._running


class Plas:
    """The calls of one engine, running and waiting."""

    def __init__(self, rules: PlasRules | None = None) -> None:
        self.rules = rules or PlasRules()
        self._numbers = count()
        self._starving: list[tuple[float, int, PlasCall]] = []  # a heap by due time, with stale entries
        self._watched = 0  # entries that are not stale

    # -- reports

    def add(
        self,
        program: str,
        *,
        arrival: float,
        priority: int = 0,
        inherited: float = 0.0,
        level: int | None = None,
        waited_s: float = 0.0,
        ran_s: float = 0.0,
    ) -> PlasCall:
        """A call has arrived and waits.

        Args:
            arrival: when it began to wait.
            inherited: service units that its program has used.
            level: where it begins, if not in the level of its program's service: it was promoted while it waited
                elsewhere, or only its level is known.
            waited_s: how long its program has waited since its last promotion, without this call.
            ran_s: how long its program has run since then, without this call.
        """
        call = PlasCall(program, priority, inherited, arrival, next(self._numbers))
        call._waited, call._ran = waited_s, ran_s
        own = self.rules.level_of(inherited)
        begins = own if level is None else min(level, len(self.rules.bounds))
        self._enter(call, begins, self.rules.budget(begins, inherited if begins >= own else 0.0))
        self._watch(call)
        return call

    def start(self, call: PlasCall, now: float) -> None:
        """The call has got a slot."""
        if not call._running:
            call._waited += max(now - call._since, 0.0)
            call._since, call._running = now, True
            self._unwatch(call)

    def stop(self, call: PlasCall, now: float) -> None:
        """The call has lost its slot and waits again."""
        if call._running:
            call._ran += max(now - call._since, 0.0)
            call._since, call._running = now, False
            self._watch(call)

    def charge(self, call: PlasCall, units: float) -> bool:
        """The call has used `units` of service. True if it has dropped to a worse level."""
        call.own += units
        call._left -= units
        if call._left > 0:
            return False
        level, left = call.level, call._left
        while left <= 0:
            level += 1
            left += self.rules.budget(level)
        self._enter(call, level, left)
        return True

    def end(self, call: PlasCall) -> None:
        """The call has ended."""
        self._unwatch(call)

    # -- decisions

    def until_demotion(self, call: PlasCall) -> float:
        """Service units that the call may still use in its level; inf in the last level."""
        return call._left

    def next_promotion(self) -> float:
        """The time of the next promotion if nothing else happens before; inf = never."""
        while self._starving and self._starving[0][0] != self._starving[0][2]._due:
            heappop(self._starving)
        return self._starving[0][0] if self._starving else inf

    def promote(self, now: float) -> list[PlasCall]:
        """Moves starving calls to the best level of their class; returns those whose level changed."""
        promoted = []
        while self.next_promotion() <= now:
            call = heappop(self._starving)[2]
            moved = call.level > 0
            self._enter(call, 0, self.rules.budget(0))
            call.promotions += 1
            call._waited = call._ran = 0.0
            call._since = now
            self._unwatch(call)
            if moved:
                promoted.append(call)
        return promoted

    def victims(self, waiting: Sequence[PlasCall], running: Sequence[PlasCall], free: int) -> list[PlasCall]:
        """Running calls to preempt for waiting ones, the worst first.

        Args:
            waiting: calls that could start, the best first; `free` + `most_victims` of them are enough.
            running: the best first.
            free: free slots.
        """
        found: list[PlasCall] = []
        for better in waiting[free : free + self.rules.most_victims]:
            if len(found) == len(running) or not better.rank < running[-1 - len(found)].rank:
                break
            found.append(running[-1 - len(found)])
        return found

    def victims_to_free(
        self, call: PlasCall, running: Sequence[PlasCall], need: float, freed_by: Callable[[PlasCall], float]
    ) -> list[PlasCall]:
        """Running calls to preempt so that a waiting one gets what it needs, such as KV blocks; the worst first.

        No call is preempted in vain: if all worse ones together do not free `need`, the list is empty. If more than
        `most_victims` are needed, the rest follow in the next steps.
        """
        found: list[PlasCall] = []
        for worse in reversed(running):
            if need <= 0 or not call.rank < worse.rank:
                break
            if (freed := freed_by(worse)) > 0:
                found.append(worse)
                need -= freed
        return found[: self.rules.most_victims] if need <= 0 else []

    # -- internals

    def _enter(self, call: PlasCall, level: int, left: float) -> None:
        call.level, call._left = level, left
        call.order = (call.priority, level, call.arrival, call._number)

    def _watch(self, call: PlasCall) -> None:
        """Notes when a waiting call will starve."""
        if not self.rules.beta or call.level == 0:
            return
        wait = self.rules.beta * max(call._ran, self.rules.floor_s) - call._waited
        call._due = call._since + max(wait, 0.0)
        self._watched += 1
        if len(self._starving) > 2 * self._watched + _SPARE:
            self._starving = [entry for entry in self._starving if entry[0] == entry[2]._due]
            heapify(self._starving)
        heappush(self._starving, (call._due, call._number, call))

    def _unwatch(self, call: PlasCall) -> None:
        if call._due != inf:
            call._due = inf
            self._watched -= 1
