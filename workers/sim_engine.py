"""The pure model of one engine with continuous batching. No clock and no event loop: time goes in as a number.

It keeps these rules of vLLM's scheduler, and nothing else of it:
1. Each step spends a token budget: running calls first, then waiting calls by (priority, level, arrival).
2. A long prompt is prefilled in chunks, as the budget allows, in the same steps in which other calls decode.
3. KV blocks are taken as tokens come. When they run out, the last running call in that order loses its blocks, waits
   again, and is recomputed.
4. Full blocks are kept under a hash chained over everything before them, and reused by any call with the same
   beginning until they are needed: least recently used first. At least one token of a prompt is always computed.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from heapq import heappop, heappush
from itertools import count

Block = int | None  # the hash of a block that others may share, None for a private one


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
        max_num_batched_tokens: token budget of one step.
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
    RUNNING = "running"
    DONE = "done"


class SimCall:
    """A call in the model. Its whole output is known from the start; `produced` says how much of it is out."""

    def __init__(self, key: str, prompt: list[int], output: list[int], *, priority: int = 0, level: int = 0) -> None:
        if not prompt or not output:
            raise ValueError("A simulated call needs at least one token of prompt and one of output.")
        self.key = key
        self.priority = priority
        self.level = level
        self.prompt_tokens = len(prompt)
        self.output_tokens = len(output)
        self.produced = 0
        self.computed = 0  # tokens whose KV is in the cache
        self.cached = -1  # prompt tokens found in the prefix cache at first start
        self.preemptions = 0
        self.phase = Phase.WAITING
        self.order: tuple[int, int, float, int] = (priority, level, 0.0, 0)
        self.blocks: list[Block] = []
        self._ids = prompt + output
        self._hashes: list[int] = []

    def __repr__(self) -> str:
        return f"SimCall({self.key}, {self.phase.value}, {self.produced} of {self.output_tokens} tokens)"

    @property
    def known(self) -> int:
        """Tokens that exist so far: the prompt and what was produced."""
        return self.prompt_tokens + self.produced

    @property
    def finished(self) -> bool:
        return self.produced >= self.output_tokens

    def block_hash(self, index: int, size: int) -> int:
        """The hash of a full block, chained over all blocks before it."""
        while len(self._hashes) <= index:
            i = len(self._hashes)
            parent = self._hashes[-1] if i else 0
            self._hashes.append(hash((parent, *self._ids[i * size : (i + 1) * size])))
        return self._hashes[index]


class BlockPool:
    """KV blocks: private ones, shared ones with a count of users, and idle ones that are kept until needed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._private = 0
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def used(self) -> int:
        """Blocks that calls hold now."""
        return self._private + len(self._users)

    def has(self, block: int) -> bool:
        return block in self._users or block in self._idle

    def fits(self, shared: list[int], new: int) -> bool:
        """Whether a call can have these shared blocks and `new` private ones."""
        woken = sum(block in self._idle for block in shared)
        return self.used + woken + new <= self.size

    def share(self, block: int) -> None:
        """One more call uses this cached block."""
        self._idle.pop(block, None)
        self._users[block] = self._users.get(block, 0) + 1

    def take(self, new: int) -> None:
        """Hands out private blocks; evicts idle ones for them."""
        self._private += new
        while self.used + len(self._idle) > self.size:
            self._idle.popitem(last=False)

    def publish(self, block: int) -> bool:
        """Makes a private block, now full, a shared one. False: another call had the same one first."""
        if self.has(block):
            return False
        self._private -= 1
        self._users[block] = 1
        return True

    def give_back(self, blocks: list[Block]) -> None:
        """Ends one call's use. The end of a call is evicted before its beginning, which others may share."""
        for block in reversed(blocks):
            if block is None:
                self._private -= 1
            else:
                self._unshare(block)

    def _unshare(self, block: int) -> None:
        self._users[block] -= 1
        if not self._users[block]:
            del self._users[block]
            self._idle[block] = None


@dataclass(slots=True)
class Step:
    """One step of the engine, from `begin` to `end`. Times in seconds."""

    starts_at: float
    ends_at: float = 0.0
    work: dict[SimCall, int] = field(default_factory=dict)  # tokens to compute
    prefill_tokens: int = 0
    decode_seqs: int = 0
    context_tokens: int = 0


class SimEngine:
    """The engine: `add` calls; then `begin` a step, wait until `ends_at`, `end` it, again until `begin` gives None."""

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.running: list[SimCall] = []
        self._waiting: list[tuple[tuple[int, int, float, int], SimCall]] = []
        self._numbers = count()

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that running calls hold, 0 to 1."""
        return self.pool.used / self.pool.size

    @property
    def waiting(self) -> int:
        """Calls that wait for a slot or for blocks."""
        return sum(call.phase is Phase.WAITING for _, call in self._waiting)

    def add(self, call: SimCall, now: float) -> None:
        """Queues a call.

        Raises:
            ValueError: prompt and output together exceed `max_len`.
        """
        if call.prompt_tokens + call.output_tokens > self.config.max_len:
            raise ValueError(f"{call!r} has more than {self.config.max_len} tokens.")
        call.order = (call.priority, call.level, now, next(self._numbers))
        heappush(self._waiting, (call.order, call))

    def remove(self, call: SimCall) -> None:
        """Ends a call wherever it is. The step in flight, if any, still takes its time."""
        if call.phase is Phase.RUNNING:
            self._release(call)
        call.phase = Phase.DONE

    def begin(self, now: float) -> Step | None:
        """Plans the step that starts now; None if there is nothing to do."""
        step = Step(now)
        budget, preempted = self._continue(step)
        for call, tokens in step.work.items():
            self._advance(call, tokens, step)
        if not preempted:
            self._admit(step, budget)
        step.ends_at = now + self._cost(step)
        return step if step.work else None

    def end(self, step: Step) -> list[SimCall]:
        """Finishes the step; returns the calls that produced a token. Finished ones have left the engine."""
        produced = [c for c in step.work if c.phase is Phase.RUNNING and c.computed == c.known]
        for call in produced:
            call.produced += 1
            if call.finished:
                self.remove(call)
        return produced

    def _continue(self, step: Step) -> tuple[int, bool]:
        """Gives running calls their share; returns the budget that is left and whether a call was preempted."""
        budget, preempted = self.config.max_num_batched_tokens, False
        for call in list(self.running):
            tokens = min(call.known - call.computed, budget)
            # A call earlier in this loop may have preempted this one.
            while tokens and call.phase is Phase.RUNNING:
                if self._grow(call, tokens):
                    step.work[call] = tokens
                    budget -= tokens
                    break
                budget += self._preempt_last(step)
                preempted = True
        return budget, preempted

    def _grow(self, call: SimCall, tokens: int) -> bool:
        new = self._blocks(call.computed + tokens) - len(call.blocks)
        if new > 0:
            if not self.pool.fits([], new):
                return False
            self.pool.take(new)
            call.blocks += [None] * new
        return True

    def _preempt_last(self, step: Step) -> int:
        """Puts the running call that is last in order back to waiting; returns the tokens it had in this step."""
        victim = max(self.running, key=lambda call: call.order)
        self._release(victim)
        victim.phase = Phase.WAITING
        victim.computed = 0
        victim.preemptions += 1
        heappush(self._waiting, (victim.order, victim))
        return step.work.pop(victim, 0)

    def _admit(self, step: Step, budget: int) -> None:
        while budget and len(self.running) < self.config.max_num_seqs and (call := self._next()):
            shared = self._cached(call)
            cached = len(shared) * self.config.block_size
            tokens = min(call.known - cached, budget)
            new = self._blocks(cached + tokens) - len(shared)
            if not self.pool.fits(shared, new):
                return  # calls behind it must not overtake it
            heappop(self._waiting)
            self._start(call, shared, new)
            step.work[call] = tokens
            self._advance(call, tokens, step)
            budget -= tokens

    def _next(self) -> SimCall | None:
        while self._waiting and self._waiting[0][1].phase is not Phase.WAITING:
            heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _cached(self, call: SimCall) -> list[int]:
        """The leading blocks of the call that the cache holds; one token at least is left to compute."""
        size, found = self.config.block_size, []
        if self.config.prefix_caching:
            for index in range((call.known - 1) // size):
                block = call.block_hash(index, size)
                if not self.pool.has(block):
                    break
                found.append(block)
        return found

    def _start(self, call: SimCall, shared: list[int], new: int) -> None:
        for block in shared:
            self.pool.share(block)
        self.pool.take(new)
        call.blocks = [*shared, *[None] * new]
        call.computed = len(shared) * self.config.block_size
        if call.cached < 0:
            call.cached = call.computed
        call.phase = Phase.RUNNING
        self.running.append(call)

    def _advance(self, call: SimCall, tokens: int, step: Step) -> None:
        """Counts the tokens as computed: like vLLM, a later call of the very same step can already share them."""
        decodes = call.produced > 0 and tokens == 1
        step.decode_seqs += decodes
        step.prefill_tokens += 0 if decodes else tokens
        step.context_tokens += call.computed
        before = call.computed // self.config.block_size
        call.computed += tokens
        if self.config.prefix_caching:
            self._publish(call, before)

    def _publish(self, call: SimCall, first: int) -> None:
        size = self.config.block_size
        for index in range(first, call.computed // size):
            block = call.block_hash(index, size)
            if self.pool.publish(block):
                call.blocks[index] = block

    def _release(self, call: SimCall) -> None:
        self.running.remove(call)
        self.pool.give_back(call.blocks)
        call.blocks = []

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    def _cost(self, step: Step) -> float:
        t = self.config.times
        work = step.prefill_tokens * t.prefill_token_s + step.decode_seqs * t.decode_seq_s
        return t.step_s + work + step.context_tokens * t.context_token_s
