"""The schedulers of a modelled engine: the order of its calls, and preemption."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, inf

from rsm.workers.backends.sim.call import Order, Phase, SimCall
from rsm.workers.backends.sim.config import SimConfig
from rsm.workers.scheduling.plas import NOTHING_IS_BETTER, Plas, PlasCall, PlasRules, Rank
from rsm.workers.scheduling.service import ServiceUnit, Tokens, Used, Work, create_unit

# The service of a completion token in the units that depend only on tokens.
_OUTPUT = 2
# Ticks between two checks of a running call, in a unit whose growth cannot be predicted.
_CHECK_TICKS = 16


class Scheduler:
    """Orders calls by arrival, or with `by_rank` by class, level and arrival. Does not preempt."""

    def __init__(self, by_rank: bool) -> None:
        self._by_rank = by_rank

    def add(self, call: SimCall, now: float, number: int) -> Order:
        """A call has arrived; returns its place in the order."""
        return (call.priority, call.level, now, number) if self._by_rank else (0, 0, now, number)

    def start(self, call: SimCall, now: float) -> None:
        """The call has got a slot."""

    def prefilled(self, call: SimCall, now: float) -> None:
        """More of the call's prompt is computed."""

    def decodes(self, call: SimCall, now: float, tick: int) -> None:
        """From this tick on the call produces one token per tick."""

    def stop(self, call: SimCall, now: float) -> None:
        """The call has lost its slot and waits again. It has stopped decoding."""

    def end(self, call: SimCall) -> None:
        """The call has ended. It has stopped decoding."""

    def settle(self, now: float, tick: int) -> Iterable[SimCall]:
        """Updates the order; returns the waiting calls whose place has changed."""
        return ()

    def quiet_until(self, tick: int) -> tuple[int, float]:
        """The tick and the time before which the order does not change, if nothing happens."""
        return 1 << 62, inf

    def outranks(self, call: SimCall) -> bool:
        """Whether a running call should be preempted for this waiting one."""
        return False

    def preemption_threshold(self) -> Rank | None:
        """The rank that a waiting call must beat to displace a running one; None: no preemption."""
        return None

    def prompt_tokens(self, call: SimCall, most: int) -> int:
        """The most prompt tokens of this call in one step."""
        return most

    def victims(
        self,
        waiting: list[SimCall],
        running: Iterable[SimCall],
        free: int,
        need: int,
        freed_by: Callable[[SimCall], int],
    ) -> list[SimCall]:
        """Running calls to preempt now.

        Args:
            waiting: the best first, at least one that `outranks`.
            free: free slots.
            need: blocks that the first waiting call lacks.
            freed_by: gives the blocks that preempting a call would free.
        """
        return []


@dataclass(slots=True)
class _Charged:
    """A call's entry in the core, and what it was charged for. `since`: when it got its slot. Times in seconds."""

    entry: PlasCall
    service: float = 0.0
    prompt: int = 0  # the most of its prompt that was ever computed
    ran_s: float = 0.0
    since: float = 0.0
    first_s: float | None = None

    def used(self, call: SimCall, now: float) -> Used:
        self.prompt = max(self.prompt, min(call.computed, call.prompt_tokens))
        ran_s = self.ran_s + now - self.since if self.entry.running else self.ran_s
        if call.produced and self.first_s is None:
            self.first_s = ran_s
        return Used(self.prompt, call.produced, max(call.cached, 0), ran_s, self.first_s)


class PlasScheduler(Scheduler):
    """Orders calls by the service of their programs, with quanta and preemption: `plas.py`, as in the vLLM plug-in."""

    def __init__(self, rules: PlasRules, unit: ServiceUnit) -> None:
        super().__init__(by_rank=True)
        self._plas = Plas(rules)
        self._unit = unit
        self._by_tokens = type(unit) in (Tokens, Work)
        self._calls: dict[SimCall, _Charged] = {}
        self._names: dict[PlasCall, SimCall] = {}
        self._ranks: dict[Rank, int] = {}  # how many calls run, by rank
        # A heap of the ticks at which decoding calls may have used up their level, with stale entries.
        self._checks: list[tuple[int, int, SimCall]] = []

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
        self._calls[call], self._names[entry] = _Charged(entry), call
        return entry.order

    def start(self, call: SimCall, now: float) -> None:
        found = self._calls[call]
        self._plas.start(found.entry, now)
        self._count(found.entry.rank, 1)
        found.since = now
        if call.preemptions == 0:
            found.prompt = call.computed  # cached tokens cost nothing

    def prefilled(self, call: SimCall, now: float) -> None:
        self._charge(call, now)

    def decodes(self, call: SimCall, now: float, tick: int) -> None:
        self._charge(call, now)
        self._check_later(call, tick)

    def stop(self, call: SimCall, now: float) -> None:
        self._charge(call, now)
        found = self._calls[call]
        found.ran_s += now - found.since
        self._count(found.entry.rank, -1)
        self._plas.stop(found.entry, now)
        call.order = found.entry.order

    def end(self, call: SimCall) -> None:
        entry = self._calls.pop(call).entry
        if entry.running:
            self._count(entry.rank, -1)
        self._plas.end(entry)
        del self._names[entry]

    def settle(self, now: float, tick: int) -> Iterable[SimCall]:
        while self._checks and self._checks[0][0] <= tick:
            _, turn, call = heappop(self._checks)
            if call.phase is Phase.DECODE and call.turn == turn and call in self._calls:
                self._charge(call, now)
                self._check_later(call, tick)
        if self._plas.next_promotion() > now:
            return ()
        promoted = [self._names[entry] for entry in self._plas.promote(now)]
        for call in promoted:
            call.order = self._calls[call].entry.order
        return promoted

    def quiet_until(self, tick: int) -> tuple[int, float]:
        return (max(self._checks[0][0], tick + 1) if self._checks else 1 << 62), self._plas.next_promotion()

    def outranks(self, call: SimCall) -> bool:
        return bool(self._ranks) and self._calls[call].entry.rank < max(self._ranks)

    def preemption_threshold(self) -> Rank | None:
        return max(self._ranks, default=NOTHING_IS_BETTER)

    def prompt_tokens(self, call: SimCall, most: int) -> int:
        better_runs = bool(self._ranks) and min(self._ranks) < self._calls[call].entry.rank
        return self._plas.rules.prompt_tokens(most, better_runs)

    def victims(
        self,
        waiting: list[SimCall],
        running: Iterable[SimCall],
        free: int,
        need: int,
        freed_by: Callable[[SimCall], int],
    ) -> list[SimCall]:
        entries = sorted((self._calls[c].entry for c in running), key=lambda e: e.order)
        first = [self._calls[c].entry for c in waiting]
        if free > 0:
            found = self._plas.victims_to_free(first[0], entries, need, lambda e: freed_by(self._names[e]))
        else:
            found = self._plas.victims(first, entries, free)
        return [self._names[e] for e in found]

    def _check_later(self, call: SimCall, tick: int) -> None:
        """Notes the earliest tick at which the call may have used up its level."""
        left = self._plas.until_demotion(self._calls[call].entry)
        if left != inf:
            ticks = ceil(left / _OUTPUT) if self._by_tokens else _CHECK_TICKS
            heappush(self._checks, (tick + ticks, call.turn, call))

    def _charge(self, call: SimCall, now: float) -> None:
        """Charges what the call has used since the last charge. Recomputation after a preemption costs nothing."""
        found = self._calls[call]
        units = self._unit.service(found.used(call, now)) - found.service
        if units <= 0:
            return
        found.service += units
        before = found.entry.rank
        if self._plas.charge(found.entry, units):
            call.order = found.entry.order
            if found.entry.running:
                self._count(before, -1)
                self._count(found.entry.rank, 1)

    def _count(self, rank: Rank, change: int) -> None:
        calls = self._ranks.get(rank, 0) + change
        if calls:
            self._ranks[rank] = calls
        else:
            del self._ranks[rank]


def create_scheduler(config: SimConfig) -> Scheduler:
    """Creates the scheduler that a configuration names."""
    if config.scheduler == "plas":
        return PlasScheduler(config.plas, create_unit(config.service_unit))
    return Scheduler(by_rank=config.scheduler == "priority")
