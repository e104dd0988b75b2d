"""The kinds of faults, their targets and durations, and the schedule that a seed draws."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import psutil

from chaos.producers.process import KINDS as PRODUCERS
from chaos.stage import ROUTERS, SIM_WORKERS, ManagedProcess, Stage

Heal = Callable[[], None]
_WARM_UP_S = 3.0
_GAP_S = 2.2


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault.

    Attributes:
        name: the name in the report.
        groups: letters of the possible targets: r (routers), w (workers with sim), v (workers with vLLM),
            p (producers). "" stands for Redis. There is one Redis, so its faults never overlap.
        lasts_s: minimum and maximum duration.
        inject: applies the fault to a process; returns a function that heals it.
        every: 3 means every third round. An engine that is killed again before it is up would never work.
    """

    name: str
    groups: str
    lasts_s: tuple[float, float]
    inject: Callable[[Stage, ManagedProcess | None, random.Random], Heal]
    every: int = 1


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned fault. Times in seconds from the start of the run."""

    at_s: float
    kind: Kind
    target: str
    lasts_s: float
    seed: int

    def __str__(self) -> str:
        return f"{self.at_s:7.1f} s  {self.kind.name:<28} {self.target:<6} for {self.lasts_s:.1f} s"


def schedule(seed: int, seconds: float, vllm: int) -> list[Fault]:
    """Draws all faults of a run, by time. Each round has every kind, shuffled, so even a short run sees each kind."""
    rng = random.Random(seed)
    targets = [f"r{i}" for i in range(ROUTERS)] + [f"w{i}" for i in range(SIM_WORKERS)]
    targets += [f"v{i}" for i in range(vllm)] + [f"p{i}" for i in range(len(PRODUCERS))]
    faults: list[Fault] = []
    now, redis_free = _WARM_UP_S, 0.0
    for kind in _rounds(rng, vllm):
        lasts = rng.uniform(*kind.lasts_s)
        target = rng.choice([t for t in targets if t[0] in kind.groups]) if kind.groups else "redis"
        at = now if kind.groups else max(now, redis_free)
        if at + lasts > seconds:
            return sorted(faults, key=lambda f: f.at_s)
        if not kind.groups:
            redis_free = at + lasts + 2.0
        faults.append(Fault(at, kind, target, lasts, rng.randrange(1 << 30)))
        now += rng.uniform(0.2, 2 * _GAP_S - 0.2)
    raise AssertionError("unreachable")


def _rounds(rng: random.Random, vllm: int) -> Iterator[Kind]:
    known = [k for k in KINDS if k.groups != "v" or vllm]
    for number in itertools.count():
        rng.shuffle(known)
        yield from (kind for kind in known if number % kind.every == 0)


def _no_healing() -> None:
    """Does nothing, because the supervisor restarts a dead process."""


def _signal(number: int) -> Callable[[Stage, ManagedProcess | None, random.Random], Heal]:
    def inject(_: Stage, process: ManagedProcess | None, __: random.Random) -> Heal:
        if process is not None and process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
        return _no_healing

    return inject


def _stop_process(_: Stage, process: ManagedProcess | None, __: random.Random) -> Heal:
    pid = process.pid if process is not None else None
    if pid is None:
        return _no_healing
    return _stop(pid)


def _stop_redis(stage: Stage, _: ManagedProcess | None, __: random.Random) -> Heal:
    return _stop(stage.server.pid) if stage.server.pid is not None else _no_healing


def _stop(pid: int) -> Heal:
    """Stops a process until it is healed."""

    def resume() -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    return resume


def _kill_redis(stage: Stage, _: ManagedProcess | None, __: random.Random) -> Heal:
    stage.server.kill()
    return stage.start_redis


def _fill_disk(stage: Stage, _: ManagedProcess | None, __: random.Random) -> Heal:
    stage.fill_disk()
    return stage.empty_disk


def _kill_engine_core(_: Stage, process: ManagedProcess | None, __: random.Random) -> Heal:
    if process is not None and process.pid is not None:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                if "EngineCore" in child.name():
                    child.kill()
    return _no_healing


def _line(
    change: Callable[[ManagedProcess, random.Random], None],
) -> Callable[[Stage, ManagedProcess | None, random.Random], Heal]:
    def inject(stage: Stage, process: ManagedProcess | None, rng: random.Random) -> Heal:
        assert process is not None
        stage.do(lambda: change(process, rng))
        return lambda: stage.do(process.line.restore)

    return inject


def _drop_replies(process: ManagedProcess, rng: random.Random) -> None:
    process.line.swallow = rng.randint(1, 6)


def _tear(process: ManagedProcess, rng: random.Random) -> None:
    process.line.tear = rng.randint(1, 4)


def _late(process: ManagedProcess, rng: random.Random) -> None:
    process.line.late = [rng.uniform(0.1, 3.0) for _ in range(rng.randint(1, 6))]


def _cut(process: ManagedProcess, _: random.Random) -> None:
    process.line.cut()


def _delay(process: ManagedProcess, rng: random.Random) -> None:
    process.line.delay_s = rng.choice((0.02, 0.1, 0.4, 2.0))


def _stall(process: ManagedProcess, _: random.Random) -> None:
    process.line.stall()


_INSTANT = (0.0, 0.0)
_LONGER_THAN_A_LEASE = (2.0, 5.0)
# The names are keys in bench/results/chaos-*.json. A line may stall for longer than a command waits for its reply
# (10 s), so the command is sent again during the fault.
KINDS = (
    Kind("kill -9 of a router", "r", _INSTANT, _signal(signal.SIGKILL)),
    Kind("kill -9 of a worker", "wv", _INSTANT, _signal(signal.SIGKILL)),
    Kind("kill -9 of a producer", "p", _INSTANT, _signal(signal.SIGKILL)),
    Kind("producer dies between push and wait", "p", _INSTANT, _signal(signal.SIGUSR1)),
    Kind("EngineCore alone killed", "v", _INSTANT, _kill_engine_core, every=3),
    Kind("SIGTERM to a router", "r", _INSTANT, _signal(signal.SIGTERM)),
    Kind("SIGTERM to a worker", "wv", _INSTANT, _signal(signal.SIGTERM)),
    Kind("router stopped beyond its lease, woken", "r", _LONGER_THAN_A_LEASE, _stop_process),
    Kind("worker stopped beyond its lease, woken", "wv", _LONGER_THAN_A_LEASE, _stop_process),
    Kind("producer stopped, woken", "p", _LONGER_THAN_A_LEASE, _stop_process),
    Kind("Redis killed, restarted", "", (0.0, 2.0), _kill_redis),
    Kind("Redis stopped, woken", "", (0.5, 4.0), _stop_redis),
    Kind("disk full for the AOF", "", (0.5, 3.0), _fill_disk),
    Kind("replies dropped", "rwvp", (1.0, 3.0), _line(_drop_replies)),
    Kind("requests torn in half", "rwvp", (1.0, 3.0), _line(_tear)),
    Kind("requests repeated, then late", "rwvp", (1.0, 3.0), _line(_late)),
    Kind("connections cut", "rwvp", _INSTANT, _line(_cut)),
    Kind("line delayed", "rwvp", (1.0, 6.0), _line(_delay)),
    Kind("line stalled, then flowing", "rwvp", (0.5, 13.0), _line(_stall)),
)
