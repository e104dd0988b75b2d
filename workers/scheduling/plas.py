"""The pure core of program-aware scheduling inside one engine. No engine and no clock: time goes in as a number (s).

It is the scheduler of Autellix (arXiv 2502.13965, section 4.2, Algorithm 1, lines 8 to 36), made for an engine that
can take a running call's place away. A call begins in the level of its program's service, not in the best one:

1. Its level is the bin of what its program had (`inherited`) and what it has used itself.
2. Each level has a budget of service, its quantum; a call that has used it falls by one level, also while it runs.
3. A call whose program waited too long for how long it ran goes to the best level of its class: (program's wait +
   call's wait) / (program's run + call's run) >= beta. Its counters then begin anew. Beyond the paper, so do the
   program's as far as this call is concerned, as in the broker's queues (`programs.lua`): else who has starved once
   is promoted again and again until its running has caught up. The program's other calls keep theirs and follow soon.
4. Order: the user's priority class, then the level, then who came first.
5. A waiting call may take the place of a running one that is strictly worse, by class and level alone; so calls of
   one level never take turns, and each exchange costs its cause a level or its victim a wait.
6. Beyond the paper: while a better call runs, a worse one's prompt is computed in pieces (`prompt_chunk`).

Whoever holds a `Plas` tells it what happens (`add`, `start`, `charge`, `stop`, `end`) and asks it what should
(`promote`, `victims`). It costs a step of an engine nothing that grows with the calls that run: `charge` may be put off
until `until_demotion` units have gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf, isfinite

from rsm.broker.protocol.rules import RUN_FLOOR_MS, level_of

_SPARE = 64  # entries of a heap that may be out of date, besides as many as are not

Rank = tuple[int, int]  # class and level; lower is better
NOTHING_IS_BETTER: Rank = (-(1 << 31), 0)
Order = tuple[int, int, float, int]  # class, level, arrival, number


@dataclass(frozen=True, slots=True, kw_only=True)
class PlasRules:
    """The free parameters, which the paper leaves open.

    Attributes:
        bounds: upper ends of the levels, in service units; above them is one level more.
        quanta: service units that a call may use in each level; none: the rest of the level's bin.
        beta: wait / run at which a program starves; 0 = never.
        floor_s: a program counts as having run for at least so long, or whoever has just begun would starve at once.
        most_victims: calls that lose their place in one step.
        prompt_chunk: up to how many prompt tokens of a step a call's may be while a better one runs; 0 = no bound.
    """

    bounds: tuple[int, ...] = (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)
    quanta: tuple[int, ...] = ()
    beta: float = 8.0
    floor_s: float = RUN_FLOOR_MS / 1000
    most_victims: int = 8
    prompt_chunk: int = 512

    def __post_init__(self) -> None:
        if list(self.bounds) != sorted(set(self.bounds)) or min(self.bounds, default=1) <= 0:
            raise ValueError("bounds must rise and be positive")
        if self.quanta and (len(self.quanta) != len(self.bounds) or min(self.quanta) <= 0):
            raise ValueError("quanta must be positive, one for each of the bounds")
        if not (isfinite(self.beta) and self.beta >= 0 and self.floor_s > 0 and self.most_victims >= 0):
            raise ValueError("beta and most_victims must not be negative, and floor_s must be positive")
        if self.prompt_chunk < 0:
            raise ValueError("prompt_chunk must not be negative")

    def level_of(self, service: float) -> int:
        """The bin of an amount of service; 0 is the best."""
        return level_of(service, self.bounds)

    def budget(self, level: int, service: float = 0.0) -> float:
        """Service units that a call may use in a level that it enters with so much service; inf in the last."""
        if level >= len(self.bounds):
            return inf
        if self.quanta:
            return self.quanta[level]
        return self.bounds[level] - max(service, self.bounds[level - 1] if level else 0)

    def prompt_tokens(self, most: int, better_runs: bool) -> int:
        """Up to how many prompt tokens of a step a call's may be. All calls wait for a step's end, so the whole of it
        (`most`) for a worse call's prompt would make a better one's next token take 20 to 40 times as long."""
        return min(most, self.prompt_chunk) if better_runs and self.prompt_chunk else most


class PlasCall:
    """A call as the core sees it. Only `Plas` writes to it.

    Attributes:
        own: service units used by the call itself.
        level: 0 is the best.
        order: sorts calls, the best first; changes with the level.
        promotions: how often it was taken for starving.
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
        self._left = inf  # of the level's budget
        # Of the program before, and of the call up to `_since`; both since the last promotion.
        self._waited = self._ran = 0.0
        self._since = arrival
        self._running = False
        self._due: float = inf  # when it will be taken for starving, if it waits until then

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
        self._starving: list[tuple[float, int, PlasCall]] = []  # a heap by due time; entries may be out of date
        self._watched = 0  # those that are not

    # -- what happens

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
        """A call has come and waits.

        Args:
            arrival: when it began to wait.
            inherited: service units that its program has had.
            level: where it begins, if not where its program's service belongs: it was promoted while it waited
                elsewhere, or nothing more is known of it.
            waited_s: how long its program has waited, without this call, since it was last promoted.
            ran_s: how long its program has run, likewise.
        """
        call = PlasCall(program, priority, inherited, arrival, next(self._numbers))
        call._waited, call._ran = waited_s, ran_s
        own = self.rules.level_of(inherited)
        begins = own if level is None else min(level, len(self.rules.bounds))
        self._enter(call, begins, self.rules.budget(begins, inherited if begins >= own else 0.0))
        self._watch(call)
        return call

    def start(self, call: PlasCall, now: float) -> None:
        """It has got a place, for the first time or again."""
        if not call._running:
            call._waited += max(now - call._since, 0.0)
            call._since, call._running = now, True
            self._unwatch(call)

    def stop(self, call: PlasCall, now: float) -> None:
        """It has lost its place and waits again."""
        if call._running:
            call._ran += max(now - call._since, 0.0)
            call._since, call._running = now, False
            self._watch(call)

    def charge(self, call: PlasCall, units: float) -> bool:
        """It has used so much service. True: it has fallen to a worse level."""
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
        """It is gone."""
        self._unwatch(call)

    # -- what should happen

    def until_demotion(self, call: PlasCall) -> float:
        """Service units that are left to it in its level; inf in the last one."""
        return call._left

    def next_promotion(self) -> float:
        """When `promote` will have something to do if nothing else happens before; inf = never."""
        while self._starving and self._starving[0][0] != self._starving[0][2]._due:
            heappop(self._starving)
        return self._starving[0][0] if self._starving else inf

    def promote(self, now: float) -> list[PlasCall]:
        """Moves the waiting calls that starve to the best level of their class; returns those whose level changed."""
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
        """Running calls that should lose their places to waiting ones, the worst first.

        Args:
            waiting: calls that could start, the best first; a few are enough (`free` and `most_victims`).
            running: the best first.
            free: places that are free.
        """
        found: list[PlasCall] = []
        for better in waiting[free : free + self.rules.most_victims]:
            if len(found) == len(running) or not better.rank < running[-1 - len(found)].rank:
                break
            found.append(running[-1 - len(found)])
        return found

    def victims_for_room(
        self, call: PlasCall, running: Sequence[PlasCall], need: float, room_of: Callable[[PlasCall], float]
    ) -> list[PlasCall]:
        """Running calls that should go so that a waiting one finds room, such as KV blocks; the worst first.

        Nobody goes in vain: where all worse ones together do not hold `need`, none is named. If more than
        `most_victims` are needed, the rest follow in the next steps.
        """
        found: list[PlasCall] = []
        for worse in reversed(running):
            if need <= 0 or not call.rank < worse.rank:
                break
            if (room := room_of(worse)) > 0:
                found.append(worse)
                need -= room
        return found[: self.rules.most_victims] if need <= 0 else []

    # -- inside

    def _enter(self, call: PlasCall, level: int, left: float) -> None:
        call.level, call._left = level, left
        call.order = (call.priority, level, call.arrival, call._number)

    def _watch(self, call: PlasCall) -> None:
        """Notes when a waiting call will be taken for starving."""
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
