"""A fleet in virtual time: programs, the router's policy, queues as in Redis, workers and modelled engines.

All decisions are made by the real code: the policies of `router/policies`, the rules of programs.lua, and the engines
of `workers/backends/sim`. Only time is modelled: hops through Redis, steps of engines, and a clock that jumps from one
event to the next. There are no failures and no cancels.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count, cycle, islice
from math import inf
from random import Random

from rsm.broker.settings import Settings
from rsm.router.policies import Policy, create_policy
from rsm.router.views import CallView
from rsm.simulation.engine import Engine
from rsm.simulation.engine_queue import Waiting
from rsm.simulation.kv_admission import Residents
from rsm.simulation.lua_rules import rules
from rsm.simulation.prefix_paths import Paths
from rsm.simulation.process_table import NOTHING, ProcessTable
from rsm.simulation.results import CallTimes, ProgramTimes, Results
from rsm.simulation.router import SimRouter
from rsm.simulation.workload.programs import ProgramSpec, Segment, Workload
from rsm.workers.backends.sim.cache import Path
from rsm.workers.backends.sim.call import SimCall, Step
from rsm.workers.backends.sim.config import SimConfig
from rsm.workers.scheduling.service import Used, charge, create_unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Hops:
    """The time of each hop between two processes at low load, in seconds. `make bench` measures their sum.

    Attributes:
        submit_s: from the producer to an engine's queue. claim_s: from the queue into the engine.
        finish_s: from the engine's last token to the producer.
        jitter: each hop takes (1 - jitter) to (1 + jitter) times as long.
    """

    submit_s: float = 0.0006
    claim_s: float = 0.0006
    finish_s: float = 0.0006
    jitter: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """The fleet to simulate.

    Attributes:
        sim: the configuration of every engine. Its `scheduler` runs inside the engines, with the bounds, beta and unit
            of `settings`.
        policy: the router's policy: a name, package.module:Class, or a class.
        settings: the broker's settings: level_bounds, starvation_beta, service_unit, tick_ms, admission, stealing and
            those that policies read.
        by_program: calls inherit their program's service; False: each call starts at zero, as in a plain MLFQ.
        prefetch: calls that a worker claims beyond its slots.
        horizon_s: when to stop; inf: when all programs have ended.
        slowness: factors on the step times of `sim`, assigned to the engines in turn.
    """

    engines: int = 1
    sim: SimConfig = field(default_factory=SimConfig)
    policy: str | type[Policy] = "autellix"
    settings: Settings = field(default_factory=Settings)
    hops: Hops = field(default_factory=Hops)
    by_program: bool = True
    prefetch: int = 2
    horizon_s: float = inf
    slowness: tuple[float, ...] = (1.0,)


class SimFleet:
    """Runs workloads on one kind of fleet. Each run starts a new fleet. Equal seeds give equal results."""

    def __init__(self, config: FleetConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed

    def run(self, workload: Workload) -> Results:
        """Runs a workload to its end, or to the horizon.

        Raises:
            InvalidRequest: lupa is not installed, or there is no such policy.
        """
        began = time.perf_counter()
        run = _Run(self.config, self.seed, workload)
        with _no_collector():
            until = run.run()
        wall = time.perf_counter() - began
        return Results(run.results(until), [e.times for e in run.engines], until, wall, run.events)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Disables the garbage collector. A run creates millions of objects and almost no cycles, and the collector would
    take a fifth of its time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


# The kinds of events, in the order for events at the same time: calls arrive before an engine starts its next step.
_READY, _ASSIGN, _FINISH, _CLAIM, _STEP, _BEGIN, _TICK = range(7)


@dataclass(slots=True, eq=False)
class _Program:
    spec: ProgramSpec
    times: ProgramTimes
    missing: list[int]  # per call, how many of the calls that it waits for have not ended
    followers: list[list[int]]
    left: int
    delays: list[float]  # per call, tool and human time on its critical path
    paths: Paths
    sessions: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, spec: ProgramSpec, block_size: int) -> _Program:
        followers: list[list[int]] = [[] for _ in spec.calls]
        for n, call in enumerate(spec.calls):
            for before in set(call.after):
                followers[before].append(n)
        missing = [len(set(call.after)) for call in spec.calls]
        delays = [c.delay_s for c in spec.calls]
        return cls(spec, ProgramTimes(spec), missing, followers, len(missing), delays, Paths(block_size))


@dataclass(slots=True, eq=False)
class _Call:
    program: _Program
    index: int
    path: Path
    times: CallTimes
    waited: Waiting | None = None  # its entry in the engine's queue
    context: int = 0  # the tokens of its engine's KV cache that it was expected to use
    admitted: bool = False  # it was throttled and is admitted now


class _Run:
    def __init__(self, config: FleetConfig, seed: int, workload: Workload) -> None:
        self._config = config
        self._random = Random(seed)  # noqa: S311
        settings = config.settings
        self._table = ProcessTable(rules(), settings.level_bounds, settings.starvation_beta, settings.service_rule)
        self._unit = create_unit(settings.service_unit)
        plas = replace(
            config.sim.plas,
            bounds=settings.level_bounds,
            beta=settings.starvation_beta,
            prompt_chunk=settings.prompt_chunk,
        )
        sim = replace(config.sim, plas=plas, service_unit=settings.service_unit)
        sims = islice(cycle(replace(sim, times=sim.times.scaled(slow)) for slow in config.slowness), config.engines)
        self.engines = [Engine(f"e{i}", s, config.prefetch, self._table) for i, s in enumerate(sims)]
        policy = config.policy
        chosen = (
            policy(settings)
            if isinstance(policy, type)
            else create_policy(settings.model_copy(update={"policy": policy}))
        )
        self._by_id = {e.id: e for e in self.engines}
        self._residents = Residents(rules(), settings, self.engines, self._table) if settings.admission else None
        self._router = SimRouter(chosen, self.engines, self._residents, settings.admission_factor, settings.stealing)
        self._tick_s, self._ticking = settings.tick_ms / 1000, False
        self._programs = [_Program.of(spec, config.sim.block_size) for spec in workload]
        self._heap: list[tuple[float, int, int, object]] = []
        self._numbers = count()
        self._texts = count(-1, -1)  # the texts of answers that no later prompt has
        self.events = 0
        self._now = 0.0
        self._do: list[Callable[..., None]] = [
            self._ready, self._assign, self._finish, self._claim, self._step_ends, self._begin,
            self._tick,
        ]  # fmt: skip

    def run(self) -> float:
        """Runs to the end or the horizon; returns that time."""
        for program in self._programs:
            for n, call in enumerate(program.spec.calls):
                if not call.after:
                    self._at(program.spec.arrival_s + call.delay_s, _READY, (program, n))
        heap, do, horizon = self._heap, self._do, self._config.horizon_s
        last = 0.0
        while heap:
            now, kind, _, what = heappop(heap)
            if now > horizon:
                return horizon
            self._now = now
            if kind != _TICK:
                last = now
            self.events += 1
            do[kind](what)
        return last

    def results(self, until: float) -> list[ProgramTimes]:
        """The programs that had arrived by then."""
        for engine in self.engines:
            engine.settle()
        return [p.times for p in self._programs if p.spec.arrival_s <= until]

    def _at(self, when: float, kind: int, what: object) -> None:
        heappush(self._heap, (when, kind, next(self._numbers), what))

    def _hop(self, seconds: float) -> float:
        jitter = self._config.hops.jitter
        return self._now + (seconds * self._random.uniform(1 - jitter, 1 + jitter) if jitter else seconds)

    # -- the steps of a call

    def _ready(self, what: tuple[_Program, int]) -> None:
        program, index = what
        spec, name = program.spec.calls[index], program.spec.id
        session = f"{name}.{spec.child}" if spec.child else name
        if spec.child:
            program.sessions.add(session)
        answer = Segment(spec.answer or next(self._texts), spec.output_tokens)
        path, tokens = program.paths.path(spec.prompt, answer)
        times = CallTimes(name, index, session, tokens, spec.output_tokens, self._now)
        program.times.calls.append(times)
        call = _Call(program, index, path, times)
        if tokens + spec.output_tokens > self._config.sim.max_len:
            times.error = program.times.error = f"more than {self._config.sim.max_len} tokens"
            return
        self._at(self._hop(self._config.hops.submit_s), _ASSIGN, call)

    def _assign(self, call: _Call) -> None:
        times, table = call.times, self._table
        session, waiting = table.session(times.session), self._waiting(call)
        times.level = waiting.level
        if not call.admitted and self._residents and self._residents.must_wait(times.session, waiting, self._now):
            self._throttle(waiting)
            return
        view = CallView(times.session, "", times.prompt_tokens, times.program)
        choice, decision = self._router.choose(self._now, view, session, waiting.had.service, times.level)
        if choice.throttle:
            self._throttle(waiting)
            return
        if choice.bind:
            session.engine = choice.engine
        times.assigned_s, times.engine, times.why = self._now, choice.engine, choice.why
        engine = self._by_id[choice.engine]
        waiting.work = times.prompt_tokens - choice.reuse
        if self._residents is not None:
            call.context = decision.context
            self._residents.arrives(engine.id, times.session, call.context, decision.new, times.level, self._now)
        engine.enqueue(waiting)
        self._wake(engine)
        if self._router.steals:
            self._start_ticking()

    def _waiting(self, call: _Call) -> Waiting:
        """The call with its place in the queue, from its program's service so far."""
        times, table = call.times, self._table
        had = table.session(times.program).account if self._config.by_program else NOTHING
        submitted, now = int(times.ready_s * 1000), int(self._now * 1000)
        place = table.place(had, submitted, now)
        promoted = now if place.promoted else -1
        name, score = f"{times.program}:{times.index}", table.score(0, place.level, submitted)
        return Waiting(name, call, times.prompt_tokens, submitted, had, place.level, place.starves_ms, promoted, score)

    def _throttle(self, waiting: Waiting) -> None:
        """The call waits in the router, because no engine has headroom or none is worth it."""
        if self._residents is None:
            self._at(self._now + self._tick_s, _ASSIGN, waiting.call)
            return
        waiting.call.admitted = False
        self._residents.throttled.add(waiting)
        self._start_ticking()

    def _start_ticking(self) -> None:
        if not self._ticking:
            self._ticking = True
            self._at(self._now + self._tick_s, _TICK, None)

    def _tick(self, _: object) -> None:
        """The router's timer, while calls are throttled, or wait where they may be stolen."""
        self._admit_throttled()
        for engine, waiting in self._router.to_move(self._now, self._table.session):
            self._move(engine, waiting)
        throttled = bool(self._residents and self._residents.throttled)
        self._ticking = False
        if throttled or (self._router.steals and any(e.queued for e in self.engines)):
            self._start_ticking()

    def _move(self, engine: Engine, waiting: Waiting) -> None:
        """Takes a call from an engine's queue and returns it to the router (steal.lua)."""
        call: _Call = waiting.call
        session = self._table.session(call.times.session)
        engine.release(waiting)
        self._router.changed(engine)
        if session.engine == engine.id:
            session.engine = ""
        if self._residents is not None:
            self._residents.moves(engine.id, call.times.session, self._now)
        call.times.moves += 1
        self._at(self._hop(self._config.hops.submit_s), _ASSIGN, call)

    def _admit_throttled(self) -> None:
        for waiting in self._residents.admit(self._now) if self._residents else ():
            waiting.call.admitted = True
            self._at(self._hop(self._config.hops.submit_s), _ASSIGN, waiting.call)

    def _wake(self, engine: Engine) -> None:
        """Wakes the worker, because a call waits or a slot is free."""
        if engine.can_claim(self._now):
            engine.claiming = True
            self._at(self._hop(self._config.hops.claim_s), _CLAIM, engine)

    def _claim(self, engine: Engine) -> None:
        engine.claiming = False
        for waiting in engine.claim(self._now):
            call: _Call = waiting.call
            call.times.claimed_s, call.waited = self._now, waiting
            engine.run(self._sim_call(waiting), call, self._now)
        self._router.changed(engine)
        self._wake(engine)
        self._continue(engine)

    def _sim_call(self, waiting: Waiting) -> SimCall:
        """The call as its worker submits it to the engine (claim.lua, `waited_and_ran`)."""
        call: _Call = waiting.call
        times, now, since = call.times, int(self._now * 1000), waiting.submitted_ms
        waited, ran = self._table.unpaid(waiting.had)
        if waiting.promoted_ms >= 0:
            waited, ran, since = 0, 0, waiting.promoted_ms
        return SimCall(
            waiting.id,
            times.prompt_tokens,
            times.output_tokens,
            call.path,
            level=waiting.level,
            program=times.program if self._config.by_program else waiting.id,
            inherited=waiting.had.service,
            waited_s=(waited + now - since) / 1000,
            ran_s=ran / 1000,
        )

    def _continue(self, engine: Engine) -> None:
        """After an event, begins a step or cuts the current one short."""
        if engine.step is None:
            self._begin(engine)
        elif engine.sim.cut(engine.step, self._now):
            self._plan_end(engine, engine.step)

    def _begin(self, engine: Engine) -> None:
        if engine.step is None and (step := engine.begin(self._now)) is not None:
            self._plan_end(engine, step)

    def _plan_end(self, engine: Engine, step: Step) -> None:
        self._at(step.ends_at, _STEP, (engine, step, step.ticks))

    def _step_ends(self, what: tuple[Engine, Step, int]) -> None:
        engine, step, ticks = what
        if engine.step is not step or step.ticks != ticks:
            return  # it was cut short
        for call in engine.end(step):
            self._at(self._hop(self._config.hops.finish_s), _FINISH, (engine, call))
        self._wake(engine)
        if self._heap and self._heap[0][0] <= self._now:
            self._at(self._now, _BEGIN, engine)  # with hops of zero length, other events of this time come first
        else:
            self._begin(engine)

    def _finish(self, what: tuple[Engine, _Call]) -> None:
        engine, call = what
        times, program = call.times, call.program
        engine.finished(times, times.prompt_tokens - call.waited.work if call.waited else 0)
        self._router.changed(engine)
        times.reported_s = self._now
        if (queued := call.waited) is not None:
            claimed, now = int((times.claimed_s or 0.0) * 1000), int(self._now * 1000)
            promoted = queued.promoted_ms - queued.submitted_ms if queued.promoted_ms >= 0 else -1
            self._table.charge(
                times.program,
                queued.had,
                charge(self._unit, _used(times)),
                claimed - queued.submitted_ms,
                now - claimed,
                promoted,
            )
        resident = times.prompt_tokens + times.output_tokens
        session = self._table.session(times.session)
        session.finished(engine.id, resident, self._now, engine.computed, times.output_tokens)
        if self._residents is not None:
            self._residents.leaves(engine.id, times.session, resident - call.context, self._now)
            self._admit_throttled()
        self._follow(program, call.index)

    def _follow(self, program: _Program, index: int) -> None:
        """Schedules the calls that waited for this one, after their delay."""
        calls, delays = program.spec.calls, program.delays
        for n in program.followers[index]:
            program.missing[n] -= 1
            if not program.missing[n]:
                delays[n] += delays[index]  # this was the last one it waited for
                self._at(self._now + calls[n].delay_s, _READY, (program, n))
        program.left -= 1
        program.times.delay_s = delays[index]
        if not program.left:
            program.times.ended_s = self._now
            program.paths = Paths(self._config.sim.block_size)  # frees the memory
            self._table.end(program.spec.id, program.sessions)
            if self._residents is not None:
                self._residents.end(program.spec.id, program.sessions)


def _used(times: CallTimes) -> Used:
    """What an ended call has used."""
    started, first, ended = (t or 0.0 for t in (times.started_s, times.first_token_s, times.ended_s))
    return Used(times.prompt_tokens, times.output_tokens, times.cached_tokens, ended - started, first - started)
