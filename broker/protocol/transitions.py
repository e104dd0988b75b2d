"""A typed command for every state change of a call, an engine or a session. lua/transitions/NAME.lua defines each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rsm.broker.errors import InvalidRequest
from rsm.broker.protocol.codec import number, pairs, text
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.messages import (
    Claimed,
    Differences,
    Event,
    Fault,
    Fence,
    Finish,
    Placed,
    Placement,
    RawCall,
    Reaped,
    Registered,
    Rejection,
    Release,
    Retained,
    SessionCancel,
    Submission,
    Submitted,
)
from rsm.broker.protocol.models import OnEngineLoss, RequestState
from rsm.broker.protocol.scripts import Arg, Command, script
from rsm.broker.protocol.snapshot import EngineView, FleetSnapshot, SessionView, SnapshotReader
from rsm.broker.protocol.waiting_calls import Waiting, WaitingCall, read_waiting
from rsm.broker.settings import Settings

__all__ = [
    "RETAIN_ENTRIES",
    "Claimed",
    "Differences",
    "EngineView",
    "Event",
    "Fault",
    "Fence",
    "Finish",
    "FleetSnapshot",
    "Placed",
    "Placement",
    "RawCall",
    "Reaped",
    "Registered",
    "Rejection",
    "Release",
    "Retained",
    "SessionCancel",
    "SessionView",
    "Submission",
    "Submitted",
    "Transitions",
]

# How many index entries, of up to 64 calls each, one run of `retain` may remove: a few milliseconds of Redis's time.
RETAIN_ENTRIES = 16


class Transitions:
    """The commands of one namespace. Building one does no I/O; `rsm.broker.connection.execute` sends it."""

    def __init__(self, keys: Keys, settings: Settings) -> None:
        self._settings = settings
        self._head: list[Arg] = [
            keys.prefix,
            settings.result_ttl_s * 1000,
            settings.session_ttl_s * 1000,
            _limits(settings),
        ]
        self._reader = SnapshotReader()
        self._level_bounds = " ".join(map(str, settings.level_bounds))
        half_ms = settings.admission_half_life_s * 1000
        # The half-life and the factor, as admit_throttled.lua expects them.
        self._admission: tuple[Arg, Arg] = (half_ms if settings.admission else "", settings.admission_factor)

    def _args(self, *args: Arg) -> list[Arg]:
        return [*self._head, *args]

    # -- producers

    def submit(self, calls: Sequence[Submission]) -> Command[list[Submitted]]:
        args = self._args()
        for c in calls:
            args += [*c.fields(), c.digest, c.body_field, c.body]
        return Command(script("submit"), args, _submitted)

    def listen(self, call_id: str, inbox: str) -> Command[str]:
        """Sends a call's events to this inbox from now on. Returns the call's state; "" = no record."""
        return Command(script("listen"), self._args(call_id, inbox), text)

    def cancel(self, call_id: str, reason: str) -> Command[str]:
        return Command(script("cancel"), self._args(call_id, reason), text)

    def cancel_session(
        self, session: str, reason: str, cursor: str = "0", descendants: bool = True
    ) -> Command[SessionCancel]:
        args = self._args(session, reason, cursor, self._settings.batch, int(descendants))
        return Command(
            script("cancel_session"), args, lambda r: SessionCancel(text(r[0]), int(r[1]), tuple(_texts(r[2:])))
        )

    # -- router

    def accept(self, calls: Sequence[RawCall]) -> Command[list[str]]:
        """Creates the records of raw calls. Returns a code for each (accept.lua)."""
        args = self._args()
        for c in calls:
            args += [c.entry, *c.request.fields(), c.digest, c.body_field]
        return Command(script("accept"), args, _texts)

    def reject(self, entries: Sequence[Rejection]) -> Command[list[str]]:
        args = self._args()
        for e in entries:
            args += e
        return Command(script("reject"), args, _texts)

    def snapshot(self, sessions: Sequence[str] = (), fleet: bool = True) -> Command[FleetSnapshot]:
        """Reads these sessions and, with `fleet`, all engines."""
        half, _ = self._admission
        args = self._args(self._level_bounds, self._settings.starvation_beta, "1" if fleet else "", half, *sessions)
        return Command(script("snapshot"), args, lambda r: self._reader.read(r, sessions))

    def assign(self, placements: Sequence[Placement]) -> Command[list[Placed]]:
        args = self._args(self._level_bounds, self._settings.starvation_beta, *self._admission)
        for p in placements:
            hit = "" if p.hit is None else int(p.hit)
            args += [p.entry, p.call_id, p.gen, p.engine, int(p.bind), p.seen, hit, p.why, p.reuse, p.costs]
            args += [int(p.throttle), p.context, p.new]
        return Command(script("assign"), args, lambda r: [Placed(text(a), text(b)) for a, b in pairs(r)])

    def reap(self, engine: str = "", incarnation: str = "") -> Command[Reaped]:
        s = self._settings
        args = self._args(s.lease_ms, s.max_deaths, s.batch, engine, incarnation)
        return Command(script("reap"), args, lambda r: Reaped(int(r[0]), _texts(r[1:])))

    def expire(self, router: str = "") -> Command[int]:
        return Command(script("expire"), self._args(self._settings.batch, router), int)

    def retain(self) -> Command[Retained]:
        s = self._settings
        return Command(
            script("retain"), self._args(s.max_retained_bytes, RETAIN_ENTRIES), lambda r: Retained(int(r[0]), int(r[1]))
        )

    def unpark(self, model: str) -> Command[int]:
        return Command(script("unpark"), self._args(model, self._settings.batch), int)

    def waiting(self, idle: Sequence[str], loaded: Sequence[str], most: int) -> Command[Waiting]:
        """Reads the first calls in the queues of loaded engines, at most `most` from each."""
        args = self._args(self._settings.max_deaths, most, len(idle), *idle, *loaded)
        return Command(script("waiting"), args, read_waiting)

    def steal(self, calls: Sequence[WaitingCall]) -> Command[list[bool]]:
        """Returns True for each call that was taken from its engine and is on the router stream again."""
        args = self._args(self._settings.max_deaths)
        for c in calls:
            args += [c.id, c.gen, c.engine, c.moves]
        return Command(script("steal"), args, lambda r: [bool(n) for n in r])

    def admit_throttled(self) -> Command[int]:
        """Puts throttled calls back on the stream if there is KV headroom for them now, or if they need none any more.

        Returns how many.
        """
        return Command(script("admit_throttled"), self._args(*self._admission, self._settings.batch), int)

    def drain(self, engine: str, op: str = "drain", incarnation: str = "") -> Command[int]:
        """`incarnation`: drain the engine only if this incarnation still owns it; "" = in any case."""
        return Command(script("drain"), self._args(engine, op, self._settings.batch, incarnation), int)

    def leave(self, router: str) -> Command[bool]:
        """Returns True if the router's consumer was deleted, False if entries are pending for it."""
        return Command(script("leave"), self._args(router), bool)

    def cached(self, session: str, engine: str, tokens: int) -> Command[bool]:
        """Records that `tokens` of the session are now cached on the engine."""
        return Command(script("affinity"), self._args("cached", session, engine, tokens), bool)

    def affinity_asked(self, hit: bool) -> Command[bool]:
        """Counts whether an engine had the cached session of a long prompt."""
        return Command(script("affinity"), self._args("asked", int(hit)), bool)

    # -- workers

    def register(
        self, engine: str, incarnation: str, fields: Mapping[str, Arg], survived: str = ""
    ) -> Command[Registered]:
        """`survived`: the previous incarnation of this same process, whose lease has expired."""
        s = self._settings
        args = self._args(engine, incarnation, s.lease_ms, s.max_deaths, survived, *_flat(fields))
        return Command(script("register"), args, _registered)

    def heartbeat(self, engine: str, incarnation: str, state: str, load: Mapping[str, Arg]) -> Command[bool]:
        """Returns True while the worker has its lease."""
        args = self._args(engine, incarnation, state, *_flat(load))
        return Command(script("heartbeat"), args, lambda r: text(r) == "ok")

    def claim(
        self,
        engine: str,
        incarnation: str,
        claim_no: int,
        most: int,
        ahead: int = 0,
        threshold: tuple[int, int] = (0, 0),
    ) -> Command[list[Claimed] | None]:
        """Returns the claimed calls; None if the lease was lost.

        Args:
            most: how many calls the engine can start.
            ahead: up to this many are claimed, even beyond `most`, if they are better than `threshold`.
            threshold: the preemption threshold, a class and a level.
        """
        args = self._args(engine, incarnation, claim_no, most, self._settings.max_deaths, ahead, *threshold)
        return Command(script("claim"), args, _claimed)

    def wake(self, engine: str) -> Command[int]:
        """Wakes the claimer that blocks on the engine's wake-up list."""
        return Command(script("wake"), self._args(engine), int)

    def publish(self, engine: str, events: Sequence[Event]) -> Command[list[str]]:
        args = self._args(engine)
        for e in events:
            f = e.fence
            args += [f.call_id, f.gen, f.attempt, e.n, e.text, " ".join(map(str, e.token_ids)), e.chunk, e.replay]
        return Command(script("publish"), args, _texts)

    def finish(self, engine: str, ends: Sequence[Finish]) -> Command[list[str]]:
        args = self._args(engine, self._settings.service_rule)
        for e in ends:
            f = e.fence
            args += [
                f.call_id,
                f.gen,
                f.attempt,
                e.state.value,
                e.error_code,
                e.error,
                e.result,
                e.prompt_tokens,
                e.completion_tokens,
                e.cached_tokens,
                e.resident_tokens,
                "" if e.events is None else e.events,
                e.service,
            ]
        return Command(script("finish"), args, _texts)

    def release(self, engine: str, calls: Sequence[Release]) -> Command[list[str]]:
        args = self._args(engine, self._settings.max_attempts, self._settings.max_deaths)
        for c in calls:
            args += [c.fence.call_id, c.fence.gen, c.fence.attempt, c.fault, c.error_code, c.error]
        return Command(script("release"), args, _texts)

    def reconcile(self, engine: str, incarnation: str, fences: Sequence[Fence]) -> Command[Differences | None]:
        """Compares the worker's calls with Redis's records. Returns None if the lease was lost."""
        args = self._args(engine, incarnation)
        for f in fences:
            args += [f.call_id, f.gen, f.attempt]
        return Command(script("reconcile"), args, lambda r: _differences(r, fences))

    # -- life cycle and process table

    def transition(
        self, call_id: str, state: RequestState, session: str = "", engine: str = "", reason: str = ""
    ) -> Command[tuple[bool, str]]:
        """Returns whether the transition was legal, and the state before; "" = there was no such call."""
        args = self._args(call_id, state.value, session, engine, reason)
        return Command(script("transition"), args, lambda r: (text(r[0]) == "ok", text(r[1])))

    def discard(self, entry: str) -> Command[bool]:
        """Deletes a dead letter. Returns False if it did not exist."""
        return Command(script("discard"), self._args(entry), bool)

    def session(self, op: str, session: str, *args: Arg) -> Command[int]:
        """Runs an operation on a session. If the script refuses it, `execute.run` raises InvalidRequest."""
        rule = (self._settings.service_rule,) if op == "charge" else ()
        return Command(script("session"), self._args(op, session, *args, *rule), _number_or_refusal)


def _texts(reply: Sequence[bytes]) -> list[str]:
    return [text(r) for r in reply]


def _number_or_refusal(reply: int | bytes) -> int:
    try:
        return int(reply)
    except ValueError:
        raise InvalidRequest(text(reply if isinstance(reply, bytes) else None)) from None


def _flat(fields: Mapping[str, Arg]) -> list[Arg]:
    return [part for pair in fields.items() for part in pair]


def _limits(s: Settings) -> str:
    """In the format of lib.lua."""
    limits = (
        s.inbox_max,
        s.max_dead_bytes,
        s.max_open_calls,
        s.max_open_bytes,
        s.max_session_calls,
        s.max_session_bytes,
    )
    return " ".join(map(str, limits))


def _submitted(reply: Sequence[bytes]) -> list[Submitted]:
    return [_submitted_call(text(code), text(detail)) for code, detail in pairs(reply)]


def _submitted_call(code: str, detail: str) -> Submitted:
    if code == "invalid":
        return Submitted(code, None, error=detail)
    if code != "overloaded":
        return Submitted(code, RequestState(detail))
    bound, _, retry_ms = detail.partition(" ")
    return Submitted(code, None, bound, int(retry_ms))


def _registered(reply: Sequence[bytes]) -> Registered:
    if text(reply[0]) == "ok":
        return Registered(True, control_from=text(reply[1]))
    return Registered(False, heartbeat_ms=number(reply[1]), node=text(reply[2]), pid=text(reply[3]))


def _claimed(reply: Sequence[Any]) -> list[Claimed] | None:
    if text(reply[0]) == "fenced":
        return None
    return [_claimed_call(r) for r in reply[1:]]


def _on_engine_loss(value: bytes) -> OnEngineLoss:
    return "restart" if value == b"restart" else "fail" if value == b"fail" else "continue"


def _claimed_call(r: Sequence[bytes]) -> Claimed:
    return Claimed(
        fence=Fence(text(r[0]), text(r[1]), number(r[2])),
        session=text(r[3]),
        kind=text(r[4]),
        stream=r[5] == b"1",
        inbox=text(r[6]),
        priority=number(r[7]),
        level=number(r[8]),
        events=number(r[9]),
        traceparent=text(r[10]),
        prompt_tokens=number(r[11]),
        body_field="json" if r[12] == b"json" else "body",
        body=r[13],
        cancelled=bool(r[14]),
        on_engine_loss=_on_engine_loss(r[15]),
        begins=number(r[16]),
        left_ms=number(r[17]) if r[17] else None,
        program=text(r[18]),
        inherited=number(r[19]),
        waited_ms=number(r[20]),
        ran_ms=number(r[21]),
        reuse=number(r[22]),
    )


def _differences(reply: Sequence[Any], fences: Sequence[Fence]) -> Differences | None:
    if reply[0] == b"fenced":
        return None
    lost, unknown = reply
    return Differences([fences[i] for i in lost], [Fence(text(r[0]), text(r[1]), int(r[2])) for r in unknown])
