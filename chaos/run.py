"""One run: starts the load, injects and heals the scheduled faults, and compares the ledgers with Redis."""

from __future__ import annotations

import heapq
import itertools
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from chaos.faults import Fault, schedule
from chaos.kept import Snapshot, busy, snapshot
from chaos.leaks import processes_of
from chaos.ledger import Story, read
from chaos.producers.calls import Pool
from chaos.stage import ManagedProcess, Stage
from chaos.verdict import Reference, Violation, Window, judge
from rsm.broker import Client
from rsm.broker.views.monitor import Monitor
from rsm.workers.backends.vllm.start.args import TINY_NAME

log = logging.getLogger("chaos")

_TICK_S = 0.2
# How long recovery may take after the last fault: a supervisor's longest pause (30 s), and the start of a real vLLM on
# a busy machine.
_RECOVERY_S = 180.0
_ENDS_WITHIN_S = 60.0
_REST_WITHIN_S = 20.0
_POOL_PROMPTS = tuple(f"Tell me about number {n}." for n in range(6))
_POOL_TOKENS = 32
_GOOD_ENDS = (0, -9)  # exit statuses of a producer that stopped in order or was killed


@dataclass(slots=True)
class Outcome:
    """The result of a run."""

    seed: int
    minutes: float
    vllm: int
    server: str
    stories: dict[str, Story] = field(default_factory=dict)
    found: Snapshot = field(default_factory=Snapshot)
    windows: list[Window] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)


def run(seed: int, minutes: float, vllm: int = 0, say: Callable[[str], None] = print) -> Outcome:
    """Runs the stage with `minutes` of faults; keeps its folder only if a promise was broken."""
    stage = Stage(seed, vllm)
    plan = schedule(seed, minutes * 60, vllm)
    say(f"seed {seed}: {len(plan)} faults in {minutes:g} min; logs and ledgers in {stage.folder}")
    say("\n".join(map(str, plan)))
    outcome = Outcome(seed, minutes, vllm, "")
    try:
        _act(stage, plan, outcome, say)
    finally:
        stage.stop()
    left = _left(stage)
    outcome.violations += [Violation("no process left", "", name) for name in left]
    if outcome.violations:
        notes = [*map(str, outcome.violations), *map(str, outcome.windows)]
        (stage.folder / "verdict.txt").write_text("\n".join(notes) + "\n")
    else:
        stage.clean_up()
    return outcome


def _act(stage: Stage, plan: Sequence[Fault], outcome: Outcome, say: Callable[[str], None]) -> None:
    stage.start()
    pool, reference = _reference_answers(stage) if outcome.vllm else (None, {})
    before = Monitor(stage.settings).stats()
    stage.start_producers(pool)
    outcome.windows = _perform(stage, plan)
    say("all faults are over")
    recovered = _until(lambda: _recovered(stage), _RECOVERY_S)
    ended = stage.stop_producers(_ENDS_WITHIN_S)
    with stage.connection() as server:
        _until(lambda: not busy(stage.settings, server), _REST_WITHIN_S)
        outcome.server = _name(server.info("server"))
        outcome.stories = read(stage.ledgers)
        outcome.found = snapshot(stage.settings, server, outcome.stories, before)
    outcome.violations = judge(outcome.stories, outcome.found, outcome.windows, reference)
    outcome.violations += _of_processes(stage, recovered, ended)


def _of_processes(stage: Stage, recovered: bool, ended: bool) -> list[Violation]:
    found = [
        Violation("producers live", "", f"{producer.name} ended with status {producer.supervised.status}")
        for producer in stage.producers
        if not producer.supervised.running and producer.supervised.status not in _GOOD_ENDS
    ]
    if not recovered:
        found.append(Violation("recovers", "", f"not all engines were READY {_RECOVERY_S:g} s after the last fault"))
    if not ended:
        found.append(Violation("stuck", "", f"producers still wait {_ENDS_WITHIN_S:g} s after SIGTERM"))
    return found


def _reference_answers(stage: Stage) -> tuple[Pool, Reference]:
    """Returns prompts for the real engines, and their answers before any fault."""
    reference = {}
    with Client(settings=stage.settings) as client:
        for prompt in _POOL_PROMPTS:
            result = client.submit(prompt, model=TINY_NAME, max_tokens=_POOL_TOKENS, temperature=0).result(120)
            reference[prompt] = (result.text, result.token_ids)
    return Pool(TINY_NAME, _POOL_PROMPTS, _POOL_TOKENS), reference


def _perform(stage: Stage, plan: Sequence[Fault]) -> list[Window]:
    """Injects and heals each fault at its time; restarts processes that exit meanwhile."""
    processes = {process.name: process for process in (*stage.routers, *stage.workers, *stage.producers)}
    order = itertools.count()
    due: list[tuple[float, int, Callable[[], None]]] = []
    windows: list[Window] = []
    began = time.monotonic()

    def inject(fault: Fault, process: ManagedProcess | None) -> None:
        started = time.time()
        log.info("%s", fault)
        heal = fault.kind.inject(stage, process, random.Random(fault.seed))

        def end() -> None:
            heal()
            windows.append(Window(fault.kind.name, fault.target, started, time.time()))

        heapq.heappush(due, (time.monotonic() - began + fault.lasts_s, next(order), end))

    for fault in plan:
        process = processes.get(fault.target)
        heapq.heappush(due, (fault.at_s, next(order), lambda f=fault, p=process: inject(f, p)))  # type: ignore[misc]
    while due:
        at, _, action = due[0]
        if time.monotonic() - began >= at:
            heapq.heappop(due)
            action()
        else:
            stage.restart_exited()
            time.sleep(min(_TICK_S, max(0.0, at - (time.monotonic() - began))))
    return windows


def _recovered(stage: Stage) -> bool:
    stage.restart_exited()
    return stage.all_ready() and stage.producers_ready()


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(_TICK_S)
    return True


def _left(stage: Stage) -> list[str]:
    """Kills the processes of the stage that still run; returns their commands."""
    _, alive = psutil.wait_procs(processes_of(stage.settings.namespace, stage.server.folder), timeout=5)
    names = []
    for process in alive:
        names.append(" ".join(process.cmdline()[:6]))
        process.kill()
    return names


def _name(info: object) -> str:
    assert isinstance(info, dict)
    return f"{info.get('server_name', 'redis')} {info.get('valkey_version') or info.get('redis_version')}"
