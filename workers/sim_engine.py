"""The pure model of one engine with continuous batching. No clock and no event loop: time goes in as a number.

It keeps these rules of vLLM's scheduler, and nothing else of it:
1. Each step spends a token budget: running calls first, then waiting calls in the order of the scheduler.
2. A long prompt is prefilled in chunks, as the budget allows, in the same steps in which other calls decode.
3. A call starts if all its tokens so far would fit into the cache. KV blocks are taken as tokens come. When they run
   out, the last running call in the order loses its blocks, waits again, and is recomputed.
4. Full blocks are kept, and reused by any call with the same beginning until they are needed (sim_cache.py). At least
   one token of a prompt is always computed. What a call computed of its prompt is there for others in the very same
   step; what it says, once it ends or loses its place.

Where nothing but decoding can happen for a while, many steps are taken at once (`begin(now, most)`), with the same
sums; a step is cut short if something comes in between. A step costs time that grows with what changes in it, not with
the calls that run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from heapq import heappop, heappush
from itertools import count
from math import ceil, sqrt
from typing import Literal

from workers.sim_cache import Hold, KVCache, Path, path_of_ids, path_of_texts

Order = tuple[int, int, float, int]
Scheduler = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimTimes:
    """What a step costs, in seconds.

    The defaults are sums for an 8B model in bfloat16 on one H100, not measurements.

    Attributes:
        step_s: every step: 16 GB of weights at 3.35 TB/s, and launching the kernels.
        prefill_token_s: each prompt token: 16 GFLOP at 450 TFLOP/s.
        decode_seq_s: each call that decodes: sampling and bookkeeping.
        context_token_s: each token of context read: 128 KiB of KV cache at 3.35 TB/s.
    """

    step_s: float = 0.006
    prefill_token_s: float = 36e-6
    decode_seq_s: float = 20e-6
    context_token_s: float = 40e-9

    def __post_init__(self) -> None:
        if min(self.step_s, self.prefill_token_s, self.decode_seq_s, self.context_token_s) < 0:
            raise ValueError("The times of a simulated engine must not be negative.")

    @classmethod
    def zero(cls) -> SimTimes:
        """All times zero: calls that cost nothing."""
        return cls(step_s=0, prefill_token_s=0, decode_seq_s=0, context_token_s=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """What engine to model.

    Attributes:
        kv_tokens: capacity of the KV cache in tokens, rounded down to whole blocks.
        block_size: tokens in one block.
        max_num_batched_tokens: token budget of one step; no more calls run than that, whatever max_num_seqs is.
        scheduler: fcfs (by arrival), priority (by class, level, arrival).
        max_model_len: most tokens of one call, prompt and output; never more than the KV cache holds.
        eos_mean: mean length, in tokens, at which an answer ends by itself; 0: never, it runs to `max_tokens`.
        speed: how many modelled seconds pass in one real second.
        die_on: failure injection: a call whose prompt has this text takes the engine down, when its first token is due.
        die_hard: so it takes the whole process down, by SIGKILL, as a fault in a driver would.
        load_s: real seconds it takes to come up, in which the event loop stands still, as it does while vLLM loads.
        stall_on: failure injection: a call whose prompt holds this text makes the engine stand still for ever, and all
            its calls with it; "" = none.
        hang_on: the same, but the whole event loop stands still.
    """

    model: str = "sim-8b"
    max_num_seqs: int = 256
    kv_tokens: int = 400_000
    block_size: int = 16
    max_num_batched_tokens: int = 8192
    max_model_len: int = 131_072
    prefix_caching: bool = True
    scheduler: Scheduler = "priority"
    eos_mean: int = 0
    times: SimTimes = field(default_factory=SimTimes)
    speed: float = 1.0
    die_on: str = ""
    die_hard: bool = False
    load_s: float = 0.0
    stall_on: str = ""
    hang_on: str = ""

    def __post_init__(self) -> None:
        if min(self.max_num_seqs, self.block_size, self.num_blocks, self.max_num_batched_tokens) < 1:
            raise ValueError("A simulated engine needs at least one slot, one block and one token a step.")
        if not isinstance(self.die_on, str):
            raise ValueError("die_on is a text; one that reads as JSON needs quotation marks of its own.")
        if self.max_len < 2 or self.eos_mean < 0 or not self.speed > 0:
            raise ValueError("A simulated engine needs room for two tokens, eos_mean >= 0 and speed > 0.")

    @property
    def num_blocks(self) -> int:
        return self.kv_tokens // self.block_size

    @property
    def slots(self) -> int:
        """Calls that run at once."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def max_len(self) -> int:
        """Most tokens of one call, in effect: a call that could never fit would preempt itself for ever."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    @property
    def instant(self) -> bool:
        """Nothing takes any time."""
        return self.times == SimTimes.zero()


class Phase(Enum):
    """Where a call is in the engine."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


class SimCall:
    """A call in the model. The length of its output is known from the start; `produced` says how much of it is out.

    Attributes:
        cached: prompt tokens found in the prefix cache at its first start, -1 before.
        started_s: when it first had a place, first_s: when its first token was out, on the model's clock; -1 before.
    """

    __slots__ = (
        "_clock",
        "_computed",
        "_produced",
        "_since",
        "cached",
        "first_s",
        "held",
        "key",
        "level",
        "order",
        "output_tokens",
        "path",
        "phase",
        "preemptions",
        "priority",
        "private",
        "prompt_tokens",
        "started_s",
        "turn",
    )

    def __init__(
        self,
        key: str,
        prompt_tokens: int,
        output_tokens: int,
        path: Path = (),
        *,
        priority: int = 0,
        level: int = 0,
    ) -> None:
        if prompt_tokens < 1 or output_tokens < 1:
            raise ValueError("A simulated call needs at least one token of prompt and one of output.")
        self.key = key
        self.priority = priority
        self.level = level
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.path = path
        self.cached = -1
        self.preemptions = 0
        self.started_s = self.first_s = -1.0
        self.phase = Phase.WAITING
        self.order: Order = (priority, level, 0.0, 0)
        self.turn = 0  # numbers the starts of calls in an engine
        self.held: Hold | None = None  # blocks that others may share
        self.private = 0  # blocks of its own; while it decodes, those that it began to decode with
        self._computed = 0  # tokens whose KV is in the cache, at tick `_since` of the engine
        self._produced = 0
        self._since = 0
        self._clock: _Ticks | None = None  # the engine's, while the call decodes

    @classmethod
    def of_ids(
        cls,
        key: str,
        prompt: Sequence[int],
        output: Sequence[int],
        block_size: int,
        *,
        priority: int = 0,
        level: int = 0,
    ) -> SimCall:
        """A call of token ids."""
        path = path_of_ids([*prompt, *output], block_size)
        return cls(key, len(prompt), len(output), path, priority=priority, level=level)

    @classmethod
    def of_texts(
        cls, key: str, texts: Sequence[tuple[int, int]], output: tuple[int, int], block_size: int, *, priority: int = 0,
        level: int = 0
    ) -> SimCall:  # fmt: skip
        """A call of texts: (number, tokens), each the first tokens of the text of that number."""
        prompt_tokens = sum(tokens for _, tokens in texts)
        path = path_of_texts([*texts, output], block_size)
        return cls(key, prompt_tokens, output[1], path, priority=priority, level=level)

    def __repr__(self) -> str:
        return f"SimCall({self.key}, {self.phase.value}, {self.produced} of {self.output_tokens} tokens)"

    @property
    def computed(self) -> int:
        """Tokens whose KV is in the cache."""
        return self._computed if self._clock is None else self._computed + self._clock.now - self._since

    @property
    def produced(self) -> int:
        """Tokens of output that are out."""
        return self._produced if self._clock is None else self._produced + self._clock.now - self._since

    @property
    def known(self) -> int:
        """Tokens that exist so far: the prompt and what was produced."""
        return self.prompt_tokens + self.produced

    @property
    def finished(self) -> bool:
        return self.produced >= self.output_tokens

    @property
    def last_tick(self) -> int:
        """The tick of the engine at which its last token is out, while it decodes."""
        return self._since + self.output_tokens - self._produced

    def join(self, clock: _Ticks) -> None:
        """Begins to decode: from now on each tick computes one token and says one."""
        self._clock, self._since, self.phase = clock, clock.now, Phase.DECODE

    def leave(self, phase: Phase) -> None:
        """Decodes no more."""
        self._computed, self._produced, self._clock, self.phase = self.computed, self.produced, None, phase


@dataclass(slots=True)
class _Ticks:
    """How many times an engine's decoding calls have moved on by one token."""

    now: int = 0


@dataclass(slots=True)
class Step:
    """One step of the engine, or `ticks` of them in which nothing but decoding happens. Times in seconds.

    Attributes:
        work: tokens of prompt to compute, by call.
        decode_seqs, context_tokens: those of the first of the steps.
    """

    starts_at: float
    ends_at: float = 0.0
    ticks: int = 1
    work: dict[SimCall, int] = field(default_factory=dict)
    prefill_tokens: int = 0
    decode_seqs: int = 0
    context_tokens: int = 0
    first_s: float = 0.0  # what the first of its steps costs
    growth_s: float = 0.0  # what each costs more than the one before

    def end_of(self, ticks: int) -> float:
        """When so many of its steps are done."""
        return self.starts_at + ticks * self.first_s + self.growth_s * (ticks * (ticks - 1) // 2)

    def ticks_until(self, now: float) -> int:
        """How many of its steps are done, or begun, at a time."""
        a, g, t = self.first_s, self.growth_s, now - self.starts_at
        b = a - g / 2
        guess = t / b if g * t < 1e-9 * b * b else (sqrt(b * b + 2 * g * t) - b) / g
        n = max(1, ceil(guess) - 1)
        while self.end_of(n) < now:  # the root is right up to rounding
            n += 1
        return n


class SimEngine:
    """The engine: `add` calls; then `begin` a step, wait until `ends_at`, `end` it, again until `begin` gives None."""

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.cache = KVCache(config.num_blocks)
        self.running: dict[SimCall, None] = {}  # in the order in which they started
        self.waiting = 0  # calls that wait for a slot or for blocks
        self._queue: list[tuple[Order, SimCall]] = []  # a heap; entries may be out of date
        self._numbers = count()
        self._turns = count()
        self._ticks = _Ticks()
        self._decoding = 0
        self._context = 0  # tokens that the decoding calls have computed, together
        # How many decoding calls need a new block in a tick, by the tick's number modulo the block size.
        self._phases = [0] * config.block_size
        self._ends: list[tuple[int, int, SimCall]] = []  # a heap of decoding calls by last tick; may be out of date
        self._step: Step | None = None
        self._stuck: tuple[SimCall, int] | None = None  # the call that did not fit, and the cache's version then

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that running calls hold, 0 to 1."""
        return self.cache.used / self.cache.size

    # -- what happens

    def add(self, call: SimCall, now: float) -> None:
        """Queues a call.

        Raises:
            ValueError: prompt and output together exceed `max_len`.
        """
        if call.prompt_tokens + call.output_tokens > self.config.max_len:
            raise ValueError(f"{call!r} has more than {self.config.max_len} tokens.")
        number = next(self._numbers)
        fcfs = self.config.scheduler == "fcfs"
        call.order = (0, 0, now, number) if fcfs else (call.priority, call.level, now, number)
        self._enqueue(call)

    def remove(self, call: SimCall) -> None:
        """Ends a call wherever it is. The step in flight, if any, still takes its time; it must be a single one."""
        if call.phase is Phase.WAITING:
            self.waiting -= 1
        elif call.phase is not Phase.DONE:
            self._release(call, grown=self._step is not None)
        call.phase = Phase.DONE

    def begin(self, now: float, most: int = 1) -> Step | None:
        """Plans the step that starts now, or up to `most` steps that need no decision; None: there is nothing to do."""
        step = Step(now, decode_seqs=self._decoding, context_tokens=self._context)
        preempted = self._continue(step)
        if not preempted:
            self._admit(step)
        if not step.work and not step.decode_seqs:
            return None
        self._price(step)
        if most > 1 and not step.work and not preempted:
            step.ticks = self._quiet_ticks(most)
        step.ends_at = step.end_of(step.ticks)
        self._step = step
        return step

    def cut(self, step: Step, now: float) -> bool:
        """Something came at this time. True: a step of several ends earlier now, for something may change by it."""
        if step.ticks == 1 or not self._may_admit() or (ticks := step.ticks_until(now)) >= step.ticks:
            return False
        step.ticks, step.ends_at = ticks, step.end_of(ticks)
        return True

    def end(self, step: Step) -> list[SimCall]:
        """Finishes the step; returns the calls that have ended. They have left the engine."""
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
                    self._decode(call)
        for call in ended:
            self.remove(call)
        return ended

    # -- a step's plan

    def _continue(self, step: Step) -> bool:
        """Gives running calls their share; returns whether a call was preempted."""
        need = self._growth(1)
        if need > self.cache.free:
            return self._squeeze(step)
        self.cache.take(need)
        partial = next(reversed(self.running), None)
        if partial is None or partial.phase is not Phase.PREFILL:
            return False
        if self._chunk(step, partial):
            return False
        self.cache.drop(need)
        return self._squeeze(step)

    def _squeeze(self, step: Step) -> bool:
        """The same, one call after the other, where blocks are short: the last call in the order makes room."""
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
                self._preempt(victim, victim in grown)
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
        """Blocks that the decoding calls need for so many ticks."""
        size, now = self.config.block_size, self._ticks.now
        rounds, rest = divmod(ticks, size)
        return rounds * self._decoding + sum(self._phases[(now + i) % size] for i in range(rest))

    def _chunk(self, step: Step, call: SimCall) -> bool:
        """The next part of a prompt that is not computed yet; False if there are no blocks for it."""
        tokens = min(call.known - call.computed, self._budget(step))
        new = self._blocks(call.computed + tokens) - call.private - _shared(call)
        if new > self.cache.free:
            return False
        self.cache.take(new)
        call.private += new
        self._advance(call, tokens, step)
        return True

    def _budget(self, step: Step) -> int:
        return self.config.max_num_batched_tokens - step.decode_seqs - step.prefill_tokens

    def _admit(self, step: Step) -> None:
        while self._may_admit() and self._budget(step):
            call = self._queue[0][1]
            cached, live = self._cached(call)
            if self._blocks(call.known) - live > self.cache.free:
                self._stuck = (call, self.cache.version)
                return  # calls behind it must not overtake it
            heappop(self._queue)
            self.waiting -= 1
            self._start(call, cached, step.starts_at)
            self._chunk(step, call)

    def _may_admit(self) -> bool:
        """Whether the first waiting call has a slot, and is not known to lack blocks."""
        call = self._next()
        return call is not None and len(self.running) < self.config.slots and self._stuck != (call, self.cache.version)

    def _next(self) -> SimCall | None:
        while self._queue and (
            self._queue[0][1].phase is not Phase.WAITING or self._queue[0][0] != self._queue[0][1].order
        ):
            heappop(self._queue)
        return self._queue[0][1] if self._queue else None

    def _cached(self, call: SimCall) -> tuple[int, int]:
        """How many leading blocks of the call are cached, and in use; one token at least is left to compute."""
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

    def _advance(self, call: SimCall, tokens: int, step: Step) -> None:
        """Counts the tokens as computed: like vLLM, a later call of the very same step can already share them."""
        step.work[call] = tokens
        step.context_tokens += call._computed
        if call._produced and tokens == 1:
            step.decode_seqs += 1
        else:
            step.prefill_tokens += tokens
        call._computed += tokens
        call.private -= self._publish(call)

    def _publish(self, call: SimCall) -> int:
        """Makes the call's full blocks known to others; returns how many were its own before."""
        full, shared = call.computed // self.config.block_size, _shared(call)
        if not self.config.prefix_caching or full <= shared:
            return 0
        before, call.held = call.held, self.cache.hold(call.path, full, full - shared)
        self.cache.let_go(before)
        return full - shared

    def _price(self, step: Step) -> None:
        t = self.config.times
        work = step.prefill_tokens * t.prefill_token_s + step.decode_seqs * t.decode_seq_s
        step.first_s = t.step_s + work + step.context_tokens * t.context_token_s
        step.growth_s = step.decode_seqs * t.context_token_s

    def _quiet_ticks(self, most: int) -> int:
        """In how many steps from now on no call ends and the blocks suffice."""
        while self._ends[0][0] != self._ends[0][2].last_tick or self._ends[0][2].phase is not Phase.DECODE:
            heappop(self._ends)
        low, high = 1, min(most, self._ends[0][0] - self._ticks.now)
        room = self.cache.free + self._growth(1)
        if self._growth(high) <= room:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._growth(middle) <= room else (low, middle)
        return low

    # -- calls that come, change and go

    def _enqueue(self, call: SimCall) -> None:
        heappush(self._queue, (call.order, call))
        self.waiting += 1

    def _decode(self, call: SimCall) -> None:
        """Its prompt is computed: from now on it says a token a tick."""
        call.join(self._ticks)
        self._decoding += 1
        self._context += call._computed
        self._phases[(call._since - call._computed) % self.config.block_size] += 1
        heappush(self._ends, (call.last_tick, call.turn, call))

    def _ended(self) -> list[SimCall]:
        ended = []
        while self._ends and self._ends[0][0] <= self._ticks.now:
            tick, _, call = heappop(self._ends)
            if call.phase is Phase.DECODE and call.last_tick == tick:
                ended.append(call)
        return ended

    def _preempt(self, call: SimCall, grown: bool) -> None:
        """Puts a running call back to waiting. `grown`: it has a block for the next token already."""
        self._release(call, grown)
        call.phase = Phase.WAITING
        call._computed = 0
        call.preemptions += 1
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
        self.cache.let_go(call.held)
        call.held, call.private = None, 0

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)


_RUNNING = (Phase.PREFILL, Phase.DECODE)


def _shared(call: SimCall) -> int:
    """Blocks of a call that others may use, too."""
    return 0 if call.held is None else call.held.upto
