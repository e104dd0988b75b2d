"""In which order a modelled engine's calls run, and which of them give way: its scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from math import ceil, inf

from workers.plas import Plas, PlasCall, PlasRules, Rank
from workers.sim_call import Order, Phase, SimCall
from workers.sim_config import SimConfig

# Service units (workers/service.py, `Tokens`): what a token costs that is computed of a prompt, and one of an answer.
_PROMPT, _OUTPUT = 1, 2


class Scheduler:
    """The order of arrival, or with `by_rank` of class, level and arrival; whoever runs, runs on."""

    def __init__(self, by_rank: bool) -> None:
        self._by_rank = by_rank

    def add(self, call: SimCall, now: float, number: int) -> Order:
        """A call has come; where it stands."""
        return (call.priority, call.level, now, number) if self._by_rank else (0, 0, now, number)

    def start(self, call: SimCall, now: float) -> None:
        """It has a place."""

    def prefilled(self, call: SimCall) -> None:
        """More of its prompt is computed."""

    def decodes(self, call: SimCall, tick: int) -> None:
        """From this tick on it says a token a tick."""

    def stop(self, call: SimCall, now: float) -> None:
        """It has lost its place and waits again. It does not decode any more."""

    def end(self, call: SimCall) -> None:
        """It is gone. It does not decode any more."""

    def settle(self, now: float, tick: int) -> Iterable[SimCall]:
        """Brings all orders up to date; returns those waiting calls whose order has changed."""
        return ()

    def quiet_until(self, tick: int) -> tuple[int, float]:
        """The tick and the time before which no order changes, if nothing happens."""
        return 1 << 62, inf

    def outranks(self, call: SimCall) -> bool:
        """Whether a running call should give way to this waiting one."""
        return False

    def victims(
        self,
        waiting: list[SimCall],
        running: Iterable[SimCall],
        free: int,
        need: int,
        room_of: Callable[[SimCall], int],
    ) -> list[SimCall]:
        """Running calls that lose their places now.

        Args:
            waiting: the best first, at least one that `outranks`.
            free: slots that are free.
            need: blocks that the first one lacks.
            room_of: blocks that would be free without a call.
        """
        return []


class PlasScheduler(Scheduler):
    """Programs by their service, with quanta and preemption: workers/plas.py, as the plug-in for vLLM has it."""

    def __init__(self, rules: PlasRules) -> None:
        super().__init__(by_rank=True)
        self._plas = Plas(rules)
        self._calls: dict[SimCall, PlasCall] = {}
        self._names: dict[PlasCall, SimCall] = {}
        self._charged: dict[SimCall, tuple[int, int]] = {}  # tokens of prompt and of output that it was charged for
        self._ranks: dict[Rank, int] = {}  # how many calls run, by rank
        # The ticks at which decoding calls will have used up their level; a heap, entries may be out of date.
        self._falls: list[tuple[int, int, SimCall]] = []

    @property
    def most_victims(self) -> int:
        return self._plas.rules.most_victims

    def add(self, call: SimCall, now: float, number: int) -> Order:
        entry = self._plas.add(
            call.program or call.key,
            arrival=now,
            priority=call.priority,
            inherited=call.inherited,
            level=call.level,
            waited_s=call.waited_s,
            ran_s=call.ran_s,
        )
        self._calls[call], self._names[entry] = entry, call
        self._charged[call] = (0, 0)
        return entry.order

    def start(self, call: SimCall, now: float) -> None:
        entry = self._calls[call]
        self._plas.start(entry, now)
        self._count(entry.rank, 1)
        if call.preemptions == 0:
            self._charged[call] = (call.computed, 0)  # what was cached costs nothing

    def prefilled(self, call: SimCall) -> None:
        prompt, output = self._charged[call]
        computed = min(call.computed, call.prompt_tokens)
        if computed > prompt:  # what is computed once more after a preemption is not the call's doing
            self._charged[call] = (computed, output)
            self._charge(call, _PROMPT * (computed - prompt))

    def decodes(self, call: SimCall, tick: int) -> None:
        self._settle_one(call)
        self._plan_fall(call, tick)

    def stop(self, call: SimCall, now: float) -> None:
        self._settle_one(call)
        entry = self._calls[call]
        self._count(entry.rank, -1)
        self._plas.stop(entry, now)
        call.order = entry.order

    def end(self, call: SimCall) -> None:
        entry = self._calls.pop(call)
        if entry.running:
            self._count(entry.rank, -1)
        self._plas.end(entry)
        del self._names[entry], self._charged[call]

    def settle(self, now: float, tick: int) -> Iterable[SimCall]:
        while self._falls and self._falls[0][0] <= tick:
            _, turn, call = heappop(self._falls)
            if call.phase is Phase.DECODE and call.turn == turn and call in self._calls:
                self._settle_one(call)
                self._plan_fall(call, tick)
        if self._plas.next_promotion() > now:
            return ()
        promoted = [self._names[entry] for entry in self._plas.promote(now)]
        for call in promoted:
            call.order = self._calls[call].order
        return promoted

    def quiet_until(self, tick: int) -> tuple[int, float]:
        return (max(self._falls[0][0], tick + 1) if self._falls else 1 << 62), self._plas.next_promotion()

    def outranks(self, call: SimCall) -> bool:
        return bool(self._ranks) and self._calls[call].rank < max(self._ranks)

    def victims(
        self,
        waiting: list[SimCall],
        running: Iterable[SimCall],
        free: int,
        need: int,
        room_of: Callable[[SimCall], int],
    ) -> list[SimCall]:
        entries = sorted((self._calls[c] for c in running), key=lambda e: e.order)
        first = [self._calls[c] for c in waiting]
        if free > 0:
            found = self._plas.victims_for_room(first[0], entries, need, lambda e: room_of(self._names[e]))
        else:
            found = self._plas.victims(first, entries, free)
        return [self._names[e] for e in found]

    def _plan_fall(self, call: SimCall, tick: int) -> None:
        left = self._plas.until_demotion(self._calls[call])
        if left != inf:
            heappush(self._falls, (tick + ceil(left / _OUTPUT), call.turn, call))

    def _settle_one(self, call: SimCall) -> None:
        prompt, output = self._charged[call]
        if call.produced > output:
            self._charged[call] = (prompt, call.produced)
            self._charge(call, _OUTPUT * (call.produced - output))

    def _charge(self, call: SimCall, units: int) -> None:
        entry = self._calls[call]
        before = entry.rank
        if self._plas.charge(entry, units):
            call.order = entry.order
            if entry.running:
                self._count(before, -1)
                self._count(entry.rank, 1)

    def _count(self, rank: Rank, change: int) -> None:
        calls = self._ranks.get(rank, 0) + change
        if calls:
            self._ranks[rank] = calls
        else:
            del self._ranks[rank]


def create_scheduler(config: SimConfig) -> Scheduler:
    """The scheduler that an engine's configuration names."""
    if config.scheduler == "plas":
        return PlasScheduler(config.plas)
    return Scheduler(by_rank=config.scheduler == "priority")
