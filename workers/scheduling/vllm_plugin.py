"""Program-aware scheduling inside vLLM: a scheduler for 0.20.2 to 0.33, with and without asynchronous scheduling.

Imported by vLLM's own engine process (`vllm/guard.py`). `plas.py` decides; this module carries it out:

1. A call's program and its service so far are passed in `SamplingParams.extra_args` (`program.py`).
2. Service is charged as tokens arrive. A running call is checked in the first step that can use up its level, so a
   step costs nothing for the other calls.
3. A call's class and level are vLLM's own `priority`, so vLLM's waiting queue and its choice of victims when the KV
   cache is full follow them. Arrival times are made distinct, because vLLM's order would not be total otherwise.
4. Running calls are sorted only where it matters. Calls in prefill, which may take the whole step, go after those that
   decode. If the KV cache is nearly full, calls are sorted by rank: until 0.33, a call that preempts itself ends the
   step for all calls after it.
5. Before each step, strictly worse running calls are preempted for waiting ones: for a slot, for KV blocks, or for the
   tokens of a step that a long prompt takes. vLLM itself never does that. Their blocks stay in the prefix cache until
   needed.
6. A step in which a better call runs computes at most one chunk of a worse call's prompt.

vLLM does not treat this interface as public. Differences and traps of its versions:

- A victim stays out of vLLM's queue during the step that takes its slot, and in 0.20 until its token in flight has
  arrived. Otherwise that step could restart it next to the token, and the token would be lost or duplicated.
- A call that could not start after a preemption for its sake (its adapter does not fit, its KV cache is still being
  loaded) is not tried again at once: after n failures, 2^n steps later.
- 0.20 collects the ids of new blocks and never drops them, so its memory grows; they are removed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from heapq import merge
from itertools import chain, islice
from math import inf
from operator import attrgetter
from time import monotonic
from typing import Any

from rsm.workers.scheduling.plas import Plas, PlasCall
from rsm.workers.scheduling.program import LEVELS, Program, Tracked, from_config, rules_of
from rsm.workers.scheduling.service import create_unit

_MOST_WAITING = 64  # waiting calls examined in one step
_MOST_PROMPTS = 8  # waiting calls whose prompts are looked up in the cache in one step
_MOST_BACKOFF = 7  # a call that could not start after a preemption is tried again after at most 2^7 steps


def make_scheduler(*args: Any, **kwargs: Any) -> Any:
    """The scheduler factory that vLLM calls in place of a class, with the same arguments."""
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    return scheduler_class(bool(config.scheduler_config.async_scheduling))(*args, **kwargs)


def scheduler_class(asynchronous: bool) -> type:
    """The scheduler of the installed vLLM, extended with program-aware rules."""
    if asynchronous:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler as Base
    else:
        from vllm.v1.core.sched.scheduler import Scheduler as Base
    return type("PlasScheduler", (ProgramAware, Base), {})


class ProgramAware:
    """A mixin for vLLM's Scheduler or AsyncScheduler."""

    running: list[Any]
    requests: dict[str, Any]
    waiting: Any
    policy: Any
    vllm_config: Any
    pause_state: Any
    block_size: int
    kv_cache_config: Any
    kv_cache_manager: Any
    max_num_running_reqs: int
    max_num_scheduled_tokens: int
    num_waiting_for_streaming_input: int
    prev_step_scheduled_req_ids: set[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        base: Any = super()
        base.__init__(*args, **kwargs)
        if self.policy.value != "priority":
            raise ValueError(
                "The engine scheduler plas needs vLLM's scheduling-policy=priority; set it in engine_args."
            )
        settings = from_config(self.vllm_config)
        self.plas = Plas(rules_of(settings))
        self._unit = create_unit(settings.service_unit)
        self._tracked: dict[str, Tracked] = {}
        self._ranks: Counter[int] = Counter()  # of running calls, by vLLM's priority
        self._prefilling: set[str] = set()
        self._parked: list[Tracked] = []  # victims that vLLM must not see yet
        self._step_victims: set[str] = set()  # victims of this step
        self._scheduled: dict[str, int] = {}  # tokens of the last step, by request
        self._steps = 0
        self._had_slots = False  # whether slots were free before the last step
        self._step_tokens = self.max_num_scheduled_tokens  # the budget of this step, or of the last one
        self._last_arrival = 0.0
        self._to_check: dict[int, list[Tracked]] = {}  # by step
        self._decode_tokens = 1 + int(getattr(self, "num_spec_tokens", 0))
        self._guards_in_flight = True  # this vLLM handles the tokens in flight of a preempted request itself
        others = (getattr(self, name, None) for name in ("skipped_waiting", "kv_holding_waiting"))
        self._queues: list[Any] = [self.waiting, *(queue for queue in others if queue is not None)]

    # -- called by vLLM

    def add_request(self, request: Any) -> None:
        if request.request_id not in self.requests:
            self._track(request)
        base: Any = super()
        base.add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        now = monotonic()
        self._steps += 1
        self._return_parked()
        self._charge_due(now)
        self._promote(now)
        candidates = self._preempt_worse(now)
        self._sort_running()
        output = self._plan(*args, **kwargs)
        self._record_step(output, now)
        for tracked in candidates:
            if not tracked.call.running:
                tracked.failures += 1
                tracked.not_before = self._steps + (1 << min(tracked.failures, _MOST_BACKOFF))
        return output

    def _plan(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own plan of a step, with this step's token budget."""
        most = self.max_num_scheduled_tokens
        self._step_tokens = self.max_num_scheduled_tokens = self._tokens_of_step(most)
        base: Any = super()
        try:
            return base.schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = most

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Also called by vLLM itself, when the KV cache is full."""
        if (tracked := self._tracked.get(request.request_id)) is not None:
            now = monotonic()
            self._charge(tracked, now)  # before vLLM resets its count of computed tokens
            self._leaves_slot(tracked)
            self.plas.stop(tracked.call, now)
            tracked.stops(now)
            tracked.seen = self._steps + 1
        base: Any = super()
        base._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None:
            self._leaves_slot(tracked)
            self.plas.end(tracked.call)
            if tracked in self._parked:
                self._parked.remove(tracked)
        base: Any = super()
        return base._free_request(request, *args, **kwargs)

    def _build_kv_connector_meta(self, connector: Any, output: Any) -> Any:
        output.preempted_req_ids = (output.preempted_req_ids or set()) | self._step_victims
        base: Any = super()
        return base._build_kv_connector_meta(connector, output)

    def get_request_counts(self) -> tuple[int, int]:
        base: Any = super()
        running, waiting = base.get_request_counts()
        return running, waiting + len(self._parked)

    def get_num_unfinished_requests(self) -> int:
        base: Any = super()
        found: int = base.get_num_unfinished_requests()
        return found + len(self._parked) if self._is_unpaused() else found

    # -- requests that arrive, start and leave

    def _track(self, request: Any) -> None:
        program = Program.of_request(request)
        request.arrival_time = self._last_arrival = max(request.arrival_time, self._last_arrival + 1e-6)
        priority, level = divmod(request.priority, LEVELS)
        call = self.plas.add(
            program.program_id,
            arrival=monotonic(),
            priority=priority,
            inherited=program.program_service,
            level=level,
            waited_s=program.program_waited_ms / 1000,
            ran_s=program.program_ran_ms / 1000,
        )
        self._tracked[request.request_id] = Tracked(request, call, self._steps + 1)
        _set_priority(request, call)

    def _record_step(self, output: Any, now: float) -> None:
        """Records what vLLM has done in this step."""
        for new in output.scheduled_new_reqs:
            self._takes_slot(new.req_id, new.num_computed_tokens, now)
        for request_id in output.scheduled_cached_reqs.resumed_req_ids:
            self._takes_slot(request_id, 0, now)
        self._scheduled = output.num_scheduled_tokens
        if self._step_victims:
            # Newer versions add them themselves.
            output.preempted_req_ids = (output.preempted_req_ids or set()) | self._step_victims
            self._step_victims = set()
        if not getattr(self, "needs_kv_cache_zeroing", True):
            self.kv_cache_manager.take_new_block_ids()

    def _takes_slot(self, request_id: str, cached: int, now: float) -> None:
        tracked = self._tracked.get(request_id)
        if tracked is None or tracked.call.running:
            return
        self.plas.start(tracked.call, now)
        tracked.starts(cached, now)
        self._check_later(tracked)
        self._ranks[tracked.request.priority] += 1
        self._prefilling.add(request_id)

    def _leaves_slot(self, tracked: Tracked) -> None:
        if tracked.call.running:
            tracked.check_at = 0
            self._ranks[tracked.request.priority] -= 1
            self._prefilling.discard(tracked.request.request_id)

    # -- levels

    def _charge_due(self, now: float) -> None:
        """Charges the running calls that may have used up their level."""
        for tracked in self._to_check.pop(self._steps, ()):
            if tracked.check_at == self._steps:
                self._charge(tracked, now)
                self._check_later(tracked)

    def _check_later(self, tracked: Tracked) -> None:
        left = self.plas.until_demotion(tracked.call)
        if left == inf:
            tracked.check_at = 0
            return
        steps = tracked.steps_until(self._unit, left, self.max_num_scheduled_tokens, self._decode_tokens)
        tracked.check_at = self._steps + steps
        self._to_check.setdefault(tracked.check_at, []).append(tracked)

    def _charge(self, tracked: Tracked, now: float) -> None:
        request = tracked.request
        if self.plas.charge(tracked.call, tracked.new_service(self._unit, now)):
            self._ranks[request.priority] -= 1
            _set_priority(request, tracked.call)
            self._ranks[request.priority] += 1

    def _promote(self, now: float) -> None:
        """Moves starving calls to their new positions in vLLM's queues."""
        if self.plas.next_promotion() > now:
            return
        promoted = set(map(id, self.plas.promote(now)))
        moved = [t for t in self._tracked.values() if id(t.call) in promoted]
        requests = {t.request for t in moved}
        for queue in self._queues:
            if found := [r for r in queue if r in requests]:
                queue.remove_requests(found)
                for request in found:
                    _set_priority(request, self._tracked[request.request_id].call)
                    queue.add_request(request)
        for tracked in moved:
            _set_priority(tracked.request, tracked.call)  # a parked one is in no queue

    def _sort_running(self) -> None:
        requests = self.requests
        if self._prefilling:
            self._prefilling = {i for i in self._prefilling if i in requests and requests[i].is_prefill_chunk}
        if self._prefilling or self._blocks_are_scarce():
            self.running.sort(key=_place)

    def _blocks_are_scarce(self) -> bool:
        """Whether this step may use up all free blocks."""
        needed = len(self.running) + self.max_num_scheduled_tokens // self.block_size
        return bool(self.kv_cache_manager.block_pool.get_num_free_blocks() < needed)

    def _tokens_of_step(self, most: int) -> int:
        """The token budget of the next step: vLLM's own limit, or less so that worse calls' prompts come in chunks.

        vLLM spends one budget on decoding calls, then on prompts in the calls' order. So the budget covers decoding and
        the prompts of the best calls, and at least one chunk.
        """
        chunk, free = self.plas.rules.prompt_chunk, self._free_slots()
        if not chunk or not (self._prefilling or (free > 0 and any(self._queues))):
            return most
        prompts = [self.requests[i] for i in self._prefilling]
        coming = list(islice(merge(*self._queues), min(free, _MOST_PROMPTS))) if free > 0 else []
        best = min(chain((rank for rank, calls in self._ranks.items() if calls > 0), (r.priority for r in coming[:1])))
        if all(r.priority <= best for r in chain(prompts, coming)):
            return most
        decoding = len(self.running) - len(prompts)
        left = most - decoding * self._decode_tokens
        tokens: int = sum(r.num_tokens - r.num_computed_tokens for r in prompts if r.priority <= best)
        tokens += sum(r.num_tokens - self._cached(r) for r in coming if r.priority <= best)
        return most - left + min(left, max(chunk, tokens))

    def _cached(self, request: Any) -> int:
        """Tokens of a waiting request that are in the cache. vLLM's statistics do not count this lookup."""
        manager = self.kv_cache_manager
        logs, manager.log_stats = manager.log_stats, False
        try:
            return int(manager.get_computed_blocks(request)[1])
        finally:
            manager.log_stats = logs

    # -- preemption

    def _preempt_worse(self, now: float) -> list[Tracked]:
        """Preempts running calls for better waiting ones; returns the waiting ones."""
        had_slots, self._had_slots = self._had_slots, self._free_slots() > 0
        if self._had_slots and not had_slots:
            return []  # the first waiting call gets a slot in this step
        worst = self._worst()
        if worst is None or not self._is_unpaused() or not self._better_waits(worst):
            return []
        candidates = list(islice(self._candidates(worst), self.plas.rules.most_victims))
        if not candidates:
            return []
        running = sorted((self._tracked[r.request_id].call for r in self.running), key=attrgetter("order"))
        if self._had_slots:
            victims = self._blockers(candidates[0], running)
            more = len(victims) == self.plas.rules.most_victims  # the rest follow in the next step
            candidates = [] if more else candidates[:1]
        else:
            candidates = list(self._within_a_step(candidates))
            victims = self.plas.victims([t.call for t in candidates], running, 0)
        chosen = {id(call) for call in victims}
        for request in [r for r in self.running if id(self._tracked[r.request_id].call) in chosen]:
            self._take_slot_from(request, now)
        return candidates[: len(victims)]

    def _worst(self) -> int | None:
        return max((rank for rank, calls in self._ranks.items() if calls > 0), default=None)

    def _better_waits(self, worst: int) -> bool:
        return any(queue and queue.peek_request().priority < worst for queue in self._queues)

    def _candidates(self, worst: int) -> Iterator[Tracked]:
        """Waiting calls that could start now and are better than a running one, the best first."""
        for request in islice(merge(*self._queues), _MOST_WAITING):
            if request.priority >= worst:
                return
            tracked = self._tracked.get(request.request_id)
            if tracked is not None and tracked.not_before <= self._steps and _is_ready(request):
                yield tracked

    def _within_a_step(self, candidates: Iterable[Tracked]) -> Iterator[Tracked]:
        """As many as one step has tokens for."""
        budget = self._tokens_of_step(self.max_num_scheduled_tokens)
        for tracked in candidates:
            if budget <= 0:
                return
            budget -= tracked.request.num_tokens - tracked.request.num_computed_tokens
            yield tracked

    def _blockers(self, candidate: Tracked, running: list[PlasCall]) -> list[PlasCall]:
        """The calls that keep a candidate waiting although slots are free: by their KV blocks, or by long prompts."""
        if candidate.seen >= self._steps:  # the last step could not have started it
            return []
        held = {id(t.call): t.request for r in self.running if (t := self._tracked[r.request_id])}
        if sum(self._scheduled.values()) >= self._step_tokens:

            def prompt_tokens(call: PlasCall) -> float:
                request = held[id(call)]
                return self._scheduled.get(request.request_id, 0) if request.is_prefill_chunk else 0

            return self.plas.victims_to_free(candidate.call, running, 1, prompt_tokens)

        def blocks(call: PlasCall) -> float:
            groups = self.kv_cache_manager.get_blocks(held[id(call)].request_id).blocks
            return sum(1 for group in groups for block in group if block.ref_cnt == 1)

        return self.plas.victims_to_free(candidate.call, running, self._missing_blocks(candidate.request), blocks)

    def _missing_blocks(self, request: Any) -> int:
        """About how many KV blocks a request needs for all of its tokens, beyond the free ones."""
        manager, groups = self.kv_cache_manager, len(self.kv_cache_config.kv_cache_groups)
        size = self.block_size
        need: int = groups * -(-(request.num_tokens + 1) // size) + getattr(manager, "watermark_blocks", 0)
        need -= manager.block_pool.get_num_free_blocks()
        if need > 0:  # cached blocks that other calls use cost nothing
            cached = manager.get_computed_blocks(request)[0]
            need -= sum(block.ref_cnt > 0 for group in cached.blocks for block in group)
        return need

    def _take_slot_from(self, request: Any, now: float) -> None:
        self.running.remove(request)
        self._preempt_request(request, now)
        self.prev_step_scheduled_req_ids.discard(request.request_id)
        self.waiting.remove_request(request)
        self._parked.append(self._tracked[request.request_id])
        self._step_victims.add(request.request_id)
        self._guards_in_flight = hasattr(request, "num_stale_output_tokens")

    def _return_parked(self) -> None:
        """Returns the victims of earlier steps to vLLM's queue."""
        still = []
        for tracked in self._parked:
            if self._guards_in_flight or not tracked.request.num_output_placeholders:
                self.waiting.add_request(tracked.request)
            else:
                still.append(tracked)
        self._parked = still

    # -- names that differ between versions

    def _free_slots(self) -> int:
        slots: int = getattr(self, "max_num_active_reqs", 0) or self.max_num_running_reqs
        return slots - len(self.running) - self.num_waiting_for_streaming_input

    def _is_unpaused(self) -> bool:
        return bool(self.pause_state.name == "UNPAUSED")


def _place(request: Any) -> tuple[bool, int, float]:
    return request.is_prefill_chunk, request.priority, request.arrival_time


def _set_priority(request: Any, call: PlasCall) -> None:
    request.priority = call.priority * LEVELS + call.level


def _is_ready(request: Any) -> bool:
    """Whether it could start in a free slot. vLLM itself checks that only when a slot is free."""
    status = request.status.name
    if status == "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR":
        return bool(request.structured_output_request.grammar)
    return status in ("WAITING", "PREEMPTED")
