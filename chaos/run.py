"""One run: the load begins, faults come and go by the schedule, all is healed, and then the books are compared."""

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
from chaos.stage import Part, Stage
from chaos.verdict import Reference, Violation, Window, judge
from rsm.broker import Client
from rsm.broker.views.monitor import Monitor
from rsm.workers.backends.vllm.start.args import TINY_NAME

log = logging.getLogger("chaos")

_TEND_S = 0.2
# How long everything may take to be well again once all faults are over: the longest pause of a supervisor (30 s) and
# the start of a real vLLM on a busy machine.
_WELL_AGAIN_S = 180.0
_ENDS_WITHIN_S = 60.0
_REST_WITHIN_S = 20.0
_POOL_PROMPTS = tuple(f"Tell me about number {n}." for n in range(6))
_POOL_TOKENS = 32
_GOOD_ENDS = (0, -9)  # of a producer: it has left, or was killed


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    seed: int
    minutes: float
    vllm: int
    server: str
    stories: dict[str, Story] = field(default_factory=dict)
    found: Snapshot = field(default_factory=Snapshot)
    windows: list[Window] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)


def run(seed: int, minutes: float, vllm: int = 0, say: Callable[[str], None] = print) -> Outcome:
    """Runs the stage for so many minutes of faults; leaves its folder behind only if a promise was broken."""
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
    pool, reference = _ask_before(stage) if outcome.vllm else (None, {})
    before = Monitor(stage.settings).stats()
    stage.start_producers(pool)
    outcome.windows = _perform(stage, plan)
    say("all faults are over")
    well = _until(lambda: _tended(stage), _WELL_AGAIN_S)
    ended = stage.stop_producers(_ENDS_WITHIN_S)
    with stage.connection() as server:
        _until(lambda: not busy(stage.settings, server), _REST_WITHIN_S)
        outcome.server = _name(server.info("server"))
        outcome.stories = read(stage.ledgers)
        outcome.found = snapshot(stage.settings, server, outcome.stories, before)
    outcome.violations = judge(outcome.stories, outcome.found, outcome.windows, reference)
    outcome.violations += _of_processes(stage, well, ended)


def _of_processes(stage: Stage, well: bool, ended: bool) -> list[Violation]:
    found = [
        Violation("producers live", "", f"{part.name} ended with {part.supervised.status}")
        for part in stage.producers
        if not part.supervised.running and part.supervised.status not in _GOOD_ENDS
    ]
    if not well:
        found.append(
            Violation("well again", "", f"not all engines were READY {_WELL_AGAIN_S:g} s after the last fault")
        )
    if not ended:
        found.append(Violation("stuck", "", f"producers still wait {_ENDS_WITHIN_S:g} s after the last fault"))
    return found


def _ask_before(stage: Stage) -> tuple[Pool, Reference]:
    """What real engines say while nothing disturbs them."""
    reference = {}
    with Client(settings=stage.settings) as client:
        for prompt in _POOL_PROMPTS:
            result = client.submit(prompt, model=TINY_NAME, max_tokens=_POOL_TOKENS, temperature=0).result(120)
            reference[prompt] = (result.text, result.token_ids)
    return Pool(TINY_NAME, _POOL_PROMPTS, _POOL_TOKENS), reference


def _perform(stage: Stage, plan: Sequence[Fault]) -> list[Window]:
    """Injects and heals each fault at its time; keeps everything running meanwhile."""
    parts = {part.name: part for part in (*stage.routers, *stage.workers, *stage.producers)}
    order = itertools.count()
    due: list[tuple[float, int, Callable[[], None]]] = []
    windows: list[Window] = []
    began = time.monotonic()

    def inject(fault: Fault, part: Part | None) -> None:
        started = time.time()
        log.info("%s", fault)
        heal = fault.kind.inject(stage, part, random.Random(fault.seed))

        def end() -> None:
            heal()
            windows.append(Window(fault.kind.name, fault.target, started, time.time()))

        heapq.heappush(due, (time.monotonic() - began + fault.lasts_s, next(order), end))

    for fault in plan:
        part = parts.get(fault.target)
        heapq.heappush(due, (fault.at_s, next(order), lambda f=fault, p=part: inject(f, p)))  # type: ignore[misc]
    while due:
        at, _, action = due[0]
        if time.monotonic() - began >= at:
            heapq.heappop(due)
            action()
        else:
            stage.tend()
            time.sleep(min(_TEND_S, max(0.0, at - (time.monotonic() - began))))
    return windows


def _tended(stage: Stage) -> bool:
    stage.tend()
    return stage.all_ready() and stage.producing()


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(_TEND_S)
    return True


def _left(stage: Stage) -> list[str]:
    """Processes of the stage that are still there; they are ended."""
    _, alive = psutil.wait_procs(processes_of(stage.settings.namespace, stage.server.folder), timeout=5)
    names = []
    for process in alive:
        names.append(" ".join(process.cmdline()[:6]))
        process.kill()
    return names


def _name(info: object) -> str:
    assert isinstance(info, dict)
    return f"{info.get('server_name', 'redis')} {info.get('valkey_version') or info.get('redis_version')}"
