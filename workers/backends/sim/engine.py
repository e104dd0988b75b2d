"""The pure model of one engine with continuous batching. No clock and no event loop: time is an argument.

It models these rules of vLLM's scheduler, and no others:
1. Each step spends a token budget: first on running calls, then on waiting calls in the order of the scheduler.
2. A long prompt is prefilled in chunks, as the budget allows, in the same steps in which other calls decode.
3. A call starts if all its tokens so far would fit into the cache. KV blocks are taken as tokens are computed. When
   they run out, the last running call in the order loses its blocks, waits again, and is recomputed.
4. Full blocks stay cached until they are evicted, and any call with the same prefix reuses them (cache.py). At least
   one token of a prompt is always computed. Other calls can share a call's prompt blocks in the same step, and its
   output blocks once it ends or is preempted.

When calls only decode for a while, many steps are taken at once (`begin(now, most)`), with the same results; such a
step is cut short if something happens before its end. The computing time of a step grows with what changes in it, not
with the number of running calls.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush, nsmallest
from itertools import count

from rsm.workers.backends.sim.cache import KVCache
from rsm.workers.backends.sim.call import Order, Phase, SimCall, Step, Ticks
from rsm.workers.backends.sim.config import SimConfig as SimConfig
from rsm.workers.backends.sim.config import SimTimes as SimTimes
from rsm.workers.backends.sim.order import create_scheduler
from rsm.workers.scheduling.plas import Rank


class SimEngine:
    """The engine. Usage: `add` calls, then repeat until `begin` returns None: `begin` a step, wait until `ends_at`,
    `end` it."""

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.cache = KVCache(config.num_blocks)
        self.running: dict[SimCall, None] = {}  # in the order in which they started
        self.waiting = 0  # calls that wait for a slot or for blocks
        self._queue: list[tuple[Order, SimCall]] = []  # a heap with stale entries
        self._scheduler = create_scheduler(config)
        self._numbers = count()
        self._turns = count()
        self._ticks = Ticks()
        self._decoding = 0
        self._context = 0  # the total of the tokens that the decoding calls have computed
        # How many decoding calls need a new block in a tick, by the tick's number modulo the block size.
        self._phases = [0] * config.block_size
        self._ends: list[tuple[int, int, SimCall]] = []  # a heap of decoding calls by last tick, with stale entries
        self._step: Step | None = None
        self._stuck: tuple[SimCall, int] | None = None  # the call that did not fit, and the cache's version then

    @property
    def kv_usage(self) -> float:
        """The share of the KV blocks that running calls use, 0 to 1."""
        return self.cache.used / self.cache.size

    def preemption_threshold(self) -> Rank | None:
        """The class and level that a waiting call must beat to displace a running one; None: no preemption."""
        return self._scheduler.preemption_threshold()

    # -- calls and steps

    def add(self, call: SimCall, now: float) -> None:
        """Queues a call.

        Raises:
            ValueError: prompt and output together exceed `max_len`.
        """
        if call.prompt_tokens + call.output_tokens > self.config.max_len:
            raise ValueError(f"{call!r} has more than {self.config.max_len} tokens.")
        call.order = self._scheduler.add(call, now, next(self._numbers))
        self._enqueue(call)

    def remove(self, call: SimCall) -> None:
        """Ends a call in any phase. A step in progress must be a single one; it still takes its time."""
        if call.phase is Phase.DONE:
            return
        if call.phase is Phase.WAITING:
            self.waiting -= 1
        else:
            self._release(call, grown=self._step is not None)
        self._scheduler.end(call)
        call.phase = Phase.DONE

    def begin(self, now: float, most: int = 1) -> Step | None:
        """Plans the step that starts now, or up to `most` steps without a decision between them; None: no work."""
        for call in self._scheduler.settle(now, self._ticks.now):
            heappush(self._queue, (call.order, call))
        decided = self._preempt_worse(now)
        step = Step(now, decode_seqs=self._decoding, context_tokens=self._context)
        preempted = self._continue(step)
        if not preempted:
            self._admit(step)
        if not step.work and not step.decode_seqs:
            return None
        self._price(step)
        if most > 1 and not (step.work or preempted or decided):
            step.ticks = self._quiet_ticks(step, most)
        step.ends_at = step.end_of(step.ticks)
        self._step = step
        return step

    def cut(self, step: Step, now: float) -> bool:
        """Cuts a multiple step short at the time of an event that may change it. True if it ends earlier now."""
        if step.ticks == 1 or not (self.config.scheduler == "plas" or self._may_admit()):
            return False
        ticks = step.ticks_until(now)
        if ticks >= step.ticks:
            return False
        step.ticks, step.ends_at = ticks, step.end_of(ticks)
        return True

    def end(self, step: Step) -> list[SimCall]:
        """Finishes the step; returns the calls that have ended and left the engine."""
        self._step = None
        if step.ticks > 1:
            self.cache.take(self._growth(step.ticks) - self._growth(1))
        self._ticks.now += step.ticks
        self._context += step.ticks * self._decoding
        ended = self._ended()
        for call in step.work:
            if call.phase is Phase.PREFILL and call.computed == call.known:
                call._produced += 1
                if call.first_s < 0:
                    call.first_s = step.ends_at
                if call.finished:
                    ended.append(call)
                else:
                    self._decode(call, step.ends_at)
        for call in ended:
            self.remove(call)
        return ended

    # -- a step's plan

    def _continue(self, step: Step) -> bool:
        """Gives running calls their tokens; returns whether a call was preempted."""
        need = self._growth(1)
        if need > self.cache.free:
            return self._squeeze(step)
        self.cache.take(need)
        partial = self._partial()
        if partial is None or self._chunk(step, partial):
            return False
        self.cache.drop(need)
        return self._squeeze(step)

    def _squeeze(self, step: Step) -> bool:
        """The same call by call, when blocks run short: the last call in the order is preempted."""
        grown: set[SimCall] = set()
        preempted = False
        for call in list(self.running):
            while call.phase in _RUNNING:
                if self._grow(step, call, grown):
                    break
                victim = max(self.running, key=lambda c: c.order)
                if victim.phase is Phase.DECODE:
                    step.decode_seqs -= 1
                    step.context_tokens -= victim.computed
                self._preempt(victim, step.starts_at, victim in grown)
                preempted = True
        return preempted

    def _grow(self, step: Step, call: SimCall, grown: set[SimCall]) -> bool:
        if call.phase is Phase.PREFILL:
            return self._chunk(step, call)
        if call.computed % self.config.block_size:
            return True
        if not self.cache.free:
            return False
        self.cache.take(1)
        grown.add(call)
        return True

    def _growth(self, ticks: int) -> int:
        """Blocks that the decoding calls need for `ticks` ticks."""
        size, now = self.config.block_size, self._ticks.now
        if ticks == 1:
            return self._phases[now % size]
        rounds, rest = divmod(ticks, size)
        return rounds * self._decoding + sum([self._phases[(now + i) % size] for i in range(rest)])

    def _chunk(self, step: Step, call: SimCall) -> bool:
        """Computes the next chunk of a prompt; False if there are no blocks for it."""
        tokens = min(call.known - call.computed, self._budget(step, call))
        new = self._blocks(call.computed + tokens) - call.private - _shared(call)
        if new > self.cache.free:
            return False
        self.cache.take(new)
        call.private += new
        self._advance(call, tokens, step)
        return True

    def _budget(self, step: Step, call: SimCall) -> int:
        """Tokens that the step has left for this call's prompt; at least 0."""
        left = self.config.max_num_batched_tokens - step.decode_seqs
        return max(0, self._scheduler.prompt_tokens(call, left) - step.prefill_tokens)

    def _admit(self, step: Step) -> None:
        while self._may_admit():
            call = self._queue[0][1]
            if not self._budget(step, call):
                return
            cached, live = self._cached(call)
            if self._blocks(call.known) - live > self.cache.free:
                self._stuck = (call, self.cache.version)
                return  # later calls must not overtake it
            heappop(self._queue)
            self.waiting -= 1
            self._start(call, cached, step.starts_at)
            self._chunk(step, call)

    def _may_admit(self) -> bool:
        """Whether there is a slot for the first waiting call, and it is not known to lack blocks."""
        call = self._next()
        return call is not None and len(self.running) < self.config.slots and self._stuck != (call, self.cache.version)

    def _next(self) -> SimCall | None:
        while self._queue and (
            self._queue[0][1].phase is not Phase.WAITING or self._queue[0][0] != self._queue[0][1].order
        ):
            heappop(self._queue)
        return self._queue[0][1] if self._queue else None

    def _cached(self, call: SimCall) -> tuple[int, int]:
        """The leading blocks of the call that are cached, and in use. At least one token is left to compute."""
        if not self.config.prefix_caching:
            return 0, 0
        return self.cache.find(call.path, (call.known - 1) // self.config.block_size)

    def _start(self, call: SimCall, cached: int, now: float) -> None:
        call.held = self.cache.hold(call.path, cached, 0) if cached else None
        call._computed = cached * self.config.block_size
        if call.cached < 0:
            call.cached, call.started_s = call._computed, now
        call.phase = Phase.PREFILL
        call.turn = next(self._turns)
        self.running[call] = None
        self._scheduler.start(call, now)

    def _advance(self, call: SimCall, tokens: int, step: Step) -> None:
        """Counts the tokens as computed. As in vLLM, a later call in the same step can already share them."""
        step.work[call] = tokens
        step.context_tokens += call._computed
        if call._produced and tokens == 1:
            step.decode_seqs += 1
        else:
            step.prefill_tokens += tokens
            step.prefill_pairs += tokens * (2 * call._computed + tokens) // 2
        call._computed += tokens
        call.private -= self._publish(call)
        self._scheduler.prefilled(call, step.starts_at)

    def _publish(self, call: SimCall) -> int:
        """Shares the call's full blocks with other calls; returns how many were private before."""
        full, shared = call.computed // self.config.block_size, _shared(call)
        if not self.config.prefix_caching or full <= shared:
            return 0
        before, call.held = call.held, self.cache.hold(call.path, full, full - shared)
        self.cache.release(before)
        return full - shared

    def _price(self, step: Step) -> None:
        t = self.config.times
        work = step.prefill_tokens * t.prefill_token_s + step.decode_seqs * t.decode_seq_s
        work += step.prefill_pairs * t.prefill_pair_s
        step.first_s = t.step_s + work + step.context_tokens * t.context_token_s
        step.growth_s = step.decode_seqs * t.context_token_s

    def _quiet_ticks(self, step: Step, most: int) -> int:
        """The number of steps in which no call ends, the order does not change, and the blocks suffice."""
        while self._ends[0][0] != self._ends[0][2].last_tick or self._ends[0][2].phase is not Phase.DECODE:
            heappop(self._ends)
        low, high = 1, min(most, self._ends[0][0] - self._ticks.now)
        if self.waiting:
            tick, time = self._scheduler.quiet_until(self._ticks.now)
            high = min(high, tick - self._ticks.now)
            if time < step.end_of(high):
                high = step.ticks_until(time)
        free = self.cache.free + self._growth(1)
        if self._growth(high) <= free:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._growth(middle) <= free else (low, middle)
        return low

    # -- calls that arrive, change and leave

    def _enqueue(self, call: SimCall) -> None:
        heappush(self._queue, (call.order, call))
        self.waiting += 1

    def _decode(self, call: SimCall, now: float) -> None:
        """The prompt is computed: from now on the call produces one token per tick."""
        call.join(self._ticks)
        self._decoding += 1
        self._context += call._computed
        self._phases[(call._since - call._computed) % self.config.block_size] += 1
        heappush(self._ends, (call.last_tick, call.turn, call))
        self._scheduler.decodes(call, now, self._ticks.now)

    def _ended(self) -> list[SimCall]:
        ended = []
        while self._ends and self._ends[0][0] <= self._ticks.now:
            tick, turn, call = heappop(self._ends)
            # A call that was preempted and restarted has two entries, perhaps with the same last tick.
            if call.phase is Phase.DECODE and call.last_tick == tick and call.turn == turn:
                ended.append(call)
        return ended

    def _preempt_worse(self, now: float) -> bool:
        """Preempts running calls for better waiting ones: for a slot, for KV blocks, or for the tokens of a step.

        Returns whether the next step may need another decision.
        """
        head = self._next()
        if head is None or not self._scheduler.outranks(head):
            return False
        free = self.config.slots - len(self.running)
        need = self._blocks(head.known) - self.cache.free
        if need > 0:
            need -= self._cached(head)[1]
        if free > 0 >= need:  # it fits, unless running calls take the blocks first or a long prompt takes whole steps
            if (partial := self._partial()) is not None and self._tokens_freed_by(partial):
                self._preempt_for(head, free, 1, self._tokens_freed_by, now)
            return True
        return self._preempt_for(head, free, need, self._blocks_freed_by, now)

    def _preempt_for(self, head: SimCall, free: int, need: int, freed_by: Callable[[SimCall], int], now: float) -> bool:
        waiting = [head]
        if free <= 0:
            valid = (e for e in self._queue if e[1].phase is Phase.WAITING and e[0] == e[1].order)
            best = nsmallest(self.config.plas.most_victims, valid)
            waiting = list(dict.fromkeys(call for _, call in best))
        victims = self._scheduler.victims(waiting, self.running, free, need, freed_by)
        for victim in victims:
            self._preempt(victim, now)
        return bool(victims)

    def _partial(self) -> SimCall | None:
        """The call whose prompt is partly computed. There is at most one, and it is the last that started."""
        last = next(reversed(self.running), None)
        return last if last is not None and last.phase is Phase.PREFILL else None

    def _blocks_freed_by(self, call: SimCall) -> int:
        """Blocks that are free once a running call is preempted."""
        own = call.private
        if call.phase is Phase.DECODE:
            own = self._blocks(call.computed) - _shared(call)
        return own + self.cache.only_used_by(call.held)

    def _tokens_freed_by(self, call: SimCall) -> int:
        """Tokens of a step that are free once a running call is preempted; 0 unless it takes the whole step."""
        budget = self._scheduler.prompt_tokens(call, self.config.max_num_batched_tokens - self._decoding)
        return budget if call.phase is Phase.PREFILL and call.known - call.computed >= budget else 0

    def _preempt(self, call: SimCall, now: float, grown: bool = False) -> None:
        """Moves a running call back to waiting. `grown`: it already has a block for the next token."""
        self._release(call, grown)
        call.phase = Phase.WAITING
        call.preemptions += 1
        self._scheduler.stop(call, now)
        call._computed = 0
        self._enqueue(call)

    def _release(self, call: SimCall, grown: bool = False) -> None:
        del self.running[call]
        own = call.private
        if call.phase is Phase.DECODE:
            self._decoding -= 1
            self._context -= call.computed
            self._phases[(call._since - call._computed) % self.config.block_size] -= 1
            own = self._blocks(call.computed + grown) - _shared(call)
            call.leave(Phase.DONE)
        own -= self._publish(call)
        self.cache.drop(own)
        self.cache.release(call.held)
        call.held, call.private = None, 0

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)


_RUNNING = (Phase.PREFILL, Phase.DECODE)


def _shared(call: SimCall) -> int:
    """Blocks of a call that other calls may share."""
    return 0 if call.held is None else call.held.upto
