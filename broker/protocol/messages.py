"""What the scripts are given and what they answer, as records; broker/protocol/transitions.py has the commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

from rsm.broker.protocol.codec import Format, number, real, text
from rsm.broker.protocol.models import CallRequest, OnEngineLoss, RequestState

LAST_TIER = 15


class Submission(NamedTuple):
    """A checked call with its encoded body: msgpack ("body") or JSON, as its result will be."""

    request: CallRequest
    digest: str
    body: bytes
    body_field: Format = "body"

    def __repr__(self) -> str:  # prompts and outputs never appear in a repr
        return f"Submission({self.request!r}, {len(self.body)} bytes)"


class Submitted(NamedTuple):
    code: str  # "new" | "duplicate" | "conflict" | "overloaded" | "invalid"
    state: RequestState | None  # None if overloaded or invalid: there is no record
    bound: str = ""  # which one is in the way (overload.lua)
    retry_ms: int = 0  # when to try again; 0 = never, its deadline has passed
    error: str = ""  # why it is invalid

    @property
    def ended(self) -> bool:
        return self.state is not None and self.state.terminal


class SessionCancel(NamedTuple):
    """One round of a session's cancel."""

    cursor: str  # "0" = done
    ended: int  # calls ended or flagged
    children: tuple[str, ...] = ()  # whose calls are to be cancelled, too


class Admission(NamedTuple):
    """A raw entry of the router stream, checked. Its body stays in Redis, in the field `body_field`."""

    entry: str
    request: CallRequest
    digest: str
    body_field: Format


class Rejection(NamedTuple):
    entry: str
    call_id: str
    gen: str
    session: str
    inbox: str
    error_code: str
    error: str


class Placement(NamedTuple):
    """Where the router puts a call. `engine=""` parks it until an engine of its model is ready.

    `reuse`: tokens of its prompt that the engine should find in its cache. `costs`: what the call would take on each
    engine, as text for its record (`costs_text`). `hold`: no engine has room for it. `context`: tokens of KV that it
    will hold, `new`: what of them no other call of its session holds on that engine; 0 where programs are not admitted.
    """

    entry: str
    call_id: str
    gen: str
    engine: str
    bind: bool
    seen: str
    hit: bool | None
    why: str
    reuse: int = 0
    costs: str = ""
    hold: bool = False
    context: int = 0
    new: int = 0


class Placed(NamedTuple):
    code: str  # see assign.lua
    engine: str


@dataclass(frozen=True, slots=True)
class Speed:
    """What a step of an engine costs, in seconds: `step_s` in any case, `token_s` for each prompt token that it
    computes, `seq_s` for each call that gets a token in it. Measured by the engine's worker."""

    step_s: float
    token_s: float
    seq_s: float

    def __str__(self) -> str:
        """As it stands in an engine's hash; `of` reads it."""
        return f"{self.step_s:.6g} {self.token_s:.6g} {self.seq_s:.6g}"

    @classmethod
    def of(cls, value: str) -> Speed | None:
        """None if there is none, or none that makes sense: it comes from another process."""
        try:
            step_s, token_s, seq_s = map(float, value.split())
        except ValueError:
            return None
        sound = all(0 <= x < inf for x in (step_s, token_s, seq_s))
        return cls(step_s, token_s, seq_s) if sound else None

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second that it computes; 0 = prompts cost nothing."""
        return 1 / self.token_s if self.token_s > 0 else 0.0

    def decode_tps(self, batch: float) -> float:
        """Output tokens per second, of all calls together, with so many calls that decode."""
        step = self.step_s + batch * self.seq_s
        return batch / step if step > 0 else 0.0


class Ahead(NamedTuple):
    """Waiting calls of one rank in an engine's queue, and the prompt tokens that they are expected to compute."""

    calls: int
    tokens: int


@dataclass(frozen=True, slots=True)
class EngineView:
    """An engine as the router sees it. Token counts are of prompts, in tokens; `heartbeat_ms` on Redis's clock.

    Attributes:
        kv_tokens: capacity of its KV cache, 0 = unknown; `kv_usage` is the share of it that running calls hold.
        speed: as measured; None = not yet.
        prefill_s: how long it will be computing the prompts of the calls that it has begun, in seconds.
        ahead: what waits in its queue, by rank (`rank_of`).
        computed: tokens whose KV it has computed in its life, prompts and outputs: how far its cache has turned over.
        cache_age_s: how long ago the oldest of what its cache can hold was computed; inf = it still has room.
        completion_tokens: how long answers were of late, in the mean; 0 = not known.
        spoken_for: tokens of its KV cache that sessions have, or will soon ask for again, by tier (residents.lua).
        reuse_found: share of the tokens that were expected in its cache and were there.
    """

    id: str
    state: str
    model: str
    heartbeat_ms: int = 0
    queued: int = 0
    running: int = 0
    queued_tokens: int = 0
    running_tokens: int = 0
    served: int = 0
    max_num_seqs: int = 1
    tokens_per_s: float = 0.0
    kv_tokens: int = 0
    kv_usage: float = 0.0
    speed: Speed | None = None
    prefill_s: float = 0.0
    ahead: Mapping[int, Ahead] = field(default_factory=dict)
    computed: int = 0
    completion_tokens: float = 0.0
    spoken_for: Sequence[float] = ()
    cache_age_s: float = inf
    reuse_found: float = 1.0

    @property
    def load_tokens(self) -> int:
        return self.queued_tokens + self.running_tokens

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second that it computes; 0 = not measured."""
        return self.speed.prefill_tps if self.speed else 0.0

    @property
    def decode_tps(self) -> float:
        """Output tokens per second with all slots taken; 0 = not measured."""
        return self.speed.decode_tps(self.max_num_seqs) if self.speed else 0.0


def rank_of(priority: int, level: int) -> int:
    """Where a call stands in its engine's queue, arrival aside: lower is earlier (programs.lua, queue_score)."""
    return (min(max(priority, -128), 127) + 128) * 16 + level


def tier_of(priority: int, level: int) -> int:
    """For whom KV cache is taken or free: 0 is the best, 15 the last (residents.lua, tier_of)."""
    return min(level, LAST_TIER) if priority == 0 else 0 if priority < 0 else LAST_TIER


def spoken_for(residents: Mapping[bytes, bytes], now_ms: int) -> int:
    """Tokens of an engine's KV cache that sessions have, of its accounts as they stand in Redis (residence.lua)."""
    active, thinking = (sum(real(n) for n in text(residents.get(name)).split()) for name in (b"active", b"thinking"))
    half_ms, idle_ms = max(1.0, real(residents.get(b"half"))), max(0, now_ms - number(residents.get(b"at")))
    return round(min(active + thinking * 2 ** (-idle_ms / half_ms), 1 << 53))


class CacheUse(NamedTuple):
    """When a session's cache on an engine was last used: `idle_s` seconds ago, when the engine had computed so many
    tokens in its life (`EngineView.computed`; None = not noted)."""

    idle_s: float
    computed: int | None = None


class Share(NamedTuple):
    """What a session has of an engine's KV cache, in tokens, decayed since its last call there ended.

    `home`: the cache still holds its context, by all that is known. `active`: it has unfinished calls there.
    `tier`: the one in which it is counted.
    """

    tokens: float = 0.0
    home: bool = False
    active: bool = False
    tier: int = 0


NOT_THERE = Share()


@dataclass(frozen=True, slots=True)
class SessionView:
    """Where a session's KV cache is believed to be: engine id → resident tokens; `bound`: the engine it is tied to.

    Attributes:
        used: engine id → the last use of that cache.
        program: the root of its tree, "" = not asked; `service`: what that has had, in service units.
        level: of a call that came now.
        completion_tokens: how long its answers were, in the mean, of `completed` calls.
        shares: engine id → what it has of that engine's KV cache, where it has any.
    """

    bound: str = ""
    resident: Mapping[str, int] = field(default_factory=dict)
    used: Mapping[str, CacheUse] = field(default_factory=dict)
    program: str = ""
    service: int = 0
    level: int = 0
    completed: int = 0
    completion_tokens: float = 0.0
    shares: Mapping[str, Share] = field(default_factory=dict)


def resident_tokens(affinity: Iterable[tuple[bytes, bytes]]) -> dict[str, int]:
    """The fields of an affinity hash, engine id and `TOKENS:LAST_USE_MS`, as tokens by engine."""
    return {text(e): number(text(v).partition(":")[0]) for e, v in affinity}


def cache_uses(affinity: Iterable[tuple[bytes, bytes]], now_ms: int) -> dict[str, CacheUse]:
    """The same fields as last uses; `TOKENS:LAST_USE_MS:COMPUTED` where a worker has written them."""
    uses = {}
    for e, value in affinity:
        _, last_ms, computed = (*text(value).split(":"), "", "")[:3]
        uses[text(e)] = CacheUse(max(0, now_ms - number(last_ms)) / 1000, number(computed) if computed else None)
    return uses


class Look(NamedTuple):
    engines: list[EngineView]
    sessions: dict[str, SessionView]


@dataclass(frozen=True, slots=True)
class Fence:
    """Names one attempt of one call. Publishing or finishing under an old fence changes nothing."""

    call_id: str
    gen: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.gen}:{self.attempt}"


@dataclass(frozen=True, slots=True)
class Claimed:
    """A call that a worker has taken.

    `events` counts the pieces that earlier attempts have published; those before number `begins` are void.
    `left_ms`: what was left until its deadline when it was claimed, on Redis's clock; None = it has none.
    `program`: the session that is charged for it, its own or an ancestor's; `inherited`: what it had been charged when
    the call was assigned, in service units. `waited_ms` and `ran_ms`: what the program has waited, this call's waiting
    until now included, and run, since a promotion last paid for it (programs.lua). `reuse`: tokens of its prompt
    that its session should have left in this engine's cache, as the router reckoned.
    """

    fence: Fence
    session: str
    kind: str
    stream: bool
    inbox: str
    priority: int
    level: int
    events: int
    traceparent: str
    prompt_tokens: int
    body_field: Format
    body: bytes = field(repr=False)
    cancelled: bool = False
    on_engine_loss: OnEngineLoss = "continue"
    begins: int = 0
    left_ms: int | None = None
    program: str = ""
    inherited: int = 0
    waited_ms: int = 0
    ran_ms: int = 0
    reuse: int = 0


class Event(NamedTuple):
    """A piece of a streamed call. `chunk` is used by OpenAI kinds, `text` and `token_ids` by `generate`."""

    fence: Fence
    n: int
    text: str
    token_ids: Sequence[int]
    chunk: str
    replay: str

    def __repr__(self) -> str:
        return f"Event({self.fence}, n={self.n})"


class Finish(NamedTuple):
    fence: Fence
    state: RequestState
    error_code: str
    error: str
    result: bytes
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    resident_tokens: int
    events: int | None = None  # published of the call, earlier attempts included
    service: int = 0  # what the call cost, in the deployment's service unit

    def __repr__(self) -> str:
        return f"Finish({self.fence}, {self.state}, {self.error_code!r})"


# Why an attempt was lost: its engine's process died, its engine failed on it, or "": it was given back in order.
Fault = Literal["death", "error", ""]


class Release(NamedTuple):
    fence: Fence
    fault: Fault
    error_code: str
    error: str

    def __repr__(self) -> str:  # its error may be what a remote server said, of the prompt too
        return f"Release({self.fence}, {self.fault!r}, {self.error_code!r})"


class Registered(NamedTuple):
    ok: bool
    control_from: str = "0-0"
    heartbeat_ms: int = 0
    node: str = ""
    pid: str = ""


class Differences(NamedTuple):
    """How a worker's calls and Redis's account of them differ."""

    lost: list[Fence]  # held by the worker, and not running on it by Redis's account
    unknown: list[Fence]  # the reverse


class Reaped(NamedTuple):
    moved: int
    engines: list[str]


class Retained(NamedTuple):
    entries: int  # of the index of finished calls that went
    early: int  # calls whose records went before their TTL
