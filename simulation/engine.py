"""One engine of a simulated fleet: its queue, its worker's claims, and the modelled engine."""

from __future__ import annotations

from math import inf
from typing import Any

from rsm.broker.protocol.models import EngineState
from rsm.broker.protocol.snapshot import EngineView
from rsm.simulation.engine_queue import Queue, Waiting
from rsm.simulation.process_table import ProcessTable
from rsm.simulation.results import CallTimes, EngineTimes
from rsm.workers.backends.sim.call import SimCall, Step
from rsm.workers.backends.sim.config import SimConfig
from rsm.workers.backends.sim.engine import SimEngine
from rsm.workers.meters.kv_cache import CacheMeter
from rsm.workers.meters.rate import RateMeter
from rsm.workers.meters.speed import Mean, SpeedMeter
from rsm.workers.runtime.claimer import CLAIM_MANY

_MOST_STEPS = 1 << 30


class Engine:
    """The state of one engine in Redis, in its worker, and in the model.

    Attributes:
        step: the model's current step. claiming: a claim is in progress.
    """

    def __init__(self, name: str, config: SimConfig, prefetch: int, table: ProcessTable) -> None:
        self.id = name
        self.sim = SimEngine(config)
        self.times = EngineTimes(name)
        self.step: Step | None = None
        self.claiming = False
        self._model = config.model
        self._kv_tokens = config.num_blocks * config.block_size
        self._slots = config.max_num_seqs
        self._most = self._free = config.max_num_seqs + prefetch
        self._queue = Queue(table)
        self._queued_tokens = self._running_tokens = self._running = self._served = 0
        self._calls: dict[SimCall, Any] = {}
        self._rate = RateMeter()
        self._speed = SpeedMeter()
        self._answers = Mean()
        self._cache = CacheMeter(self._kv_tokens)
        self._prefill_until = 0.0

    # -- in Redis

    def enqueue(self, waiting: Waiting) -> None:
        self._queue.add(waiting)
        self._queued_tokens += waiting.tokens
        self._served += 1

    def release(self, waiting: Waiting) -> None:
        """A waiting call goes back to the router."""
        self._queue.remove(waiting)
        self._queued_tokens -= waiting.tokens

    def head(self, most: int) -> list[Waiting]:
        """The first calls of its queue."""
        return self._queue.head(most)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def free(self) -> bool:
        """Whether it has a free slot and no waiting calls."""
        return not self._queue and self._running < self._slots

    def finished(self, times: CallTimes, reuse: int) -> None:
        """A call's end has reached Redis. `reuse`: prompt tokens that it was expected to find in the cache."""
        self._running -= 1
        self._running_tokens -= times.prompt_tokens
        self._cache.add(times.prompt_tokens - times.cached_tokens + times.output_tokens, times.ended_s or 0.0)
        self._cache.found(reuse, times.cached_tokens)
        self._answers.add(times.output_tokens)

    @property
    def computed(self) -> int:
        """The total of computed tokens."""
        return self._cache.computed

    def view(self, now: float) -> EngineView:
        """The view that a router would get now."""
        return EngineView(
            self.id,
            EngineState.READY,
            self._model,
            int(now * 1000),
            len(self._queue),
            self._running,
            self._queued_tokens,
            self._running_tokens,
            self._served,
            self._slots,
            self._rate.per_s(now),
            self._kv_tokens,
            self.sim.kv_usage,
            self._speed.speed if self._speed.measured else None,
            max(0.0, self._prefill_until - now),
            dict(self._queue.ahead),
            self.computed,
            self._answers.value,
            cache_age_s=self._cache.age_s(now),
            reuse_found=self._cache.reuse_found,
        )

    # -- in the worker

    def can_claim(self, now: float) -> bool:
        if self.claiming or not self._queue:
            return False
        threshold, now_ms = self.sim.preemption_threshold(), int(now * 1000)
        return self._free > 0 or (self._ahead() > 0 and self._queue.has_better(threshold, now_ms))

    def _ahead(self) -> int:
        """How many calls above the preemption threshold may be claimed when no slot is free."""
        if self._free > 0 or self.sim.preemption_threshold() is None:
            return 0
        return min(self._most + self._free, CLAIM_MANY)

    def claim(self, now: float) -> list[Waiting]:
        """Takes the first calls of the queue, as many as slots are free; if none is, those above the threshold."""
        most = max(0, min(self._free, CLAIM_MANY))
        taken = self._queue.claim(most, int(now * 1000), self._ahead(), self.sim.preemption_threshold())
        tokens = sum(w.tokens for w in taken)
        self._queued_tokens -= tokens
        self._running_tokens += tokens
        self._running += len(taken)
        self._free -= len(taken)
        prefill_s = sum(w.work for w in taken) * self._speed.speed.token_s
        self._prefill_until = max(now, self._prefill_until) + prefill_s
        return taken

    def run(self, sim_call: SimCall, call: Any, now: float) -> None:
        """Puts a claimed call into the model."""
        self._calls[sim_call] = call
        self.sim.add(sim_call, now)

    # -- in the model

    def begin(self, now: float) -> Step | None:
        self.step = self.sim.begin(now, _MOST_STEPS)
        return self.step

    def end(self, step: Step) -> list[Any]:
        """Ends the step; returns the calls that ended with it."""
        now, self.step = step.ends_at, None
        self.times.busy_s += now - step.starts_at
        self.times.steps += step.ticks
        tokens = step.ticks * step.decode_seqs + len(step.work)
        self._rate.add(tokens, now)
        self._speed.add(now - step.starts_at, step.ticks, step.prefill_tokens, tokens)
        ended = self.sim.end(step)
        self._free += len(ended)
        return [self._note(sim_call, now) for sim_call in ended]

    def _note(self, sim_call: SimCall, ended: float | None) -> Any:
        call = self._calls.pop(sim_call)
        times = call.times
        times.started_s = _known(sim_call.started_s)
        times.first_token_s = _known(sim_call.first_s)
        times.ended_s = ended
        times.cached_tokens = max(0, sim_call.cached)
        times.preemptions = sim_call.preemptions
        self.times.preemptions += sim_call.preemptions
        if ended is not None:
            self.times.calls += 1
            self.times.prompt_tokens += times.prompt_tokens
            self.times.cached_tokens += times.cached_tokens
            self.times.output_tokens += times.output_tokens
        return call

    def settle(self) -> None:
        """Notes the progress of the calls that are still here at the end of the run."""
        for sim_call in list(self._calls):
            self._note(sim_call, None)


def _known(seconds: float) -> float | None:
    return None if seconds < 0 or seconds == inf else seconds
