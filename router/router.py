"""The router process.

1. Reads the router stream in batches, as one consumer of a group that all routers share.
2. Checks each entry, creates records for bare ones, and rejects bad ones with an error message.
3. Chooses an engine for each call with the policy, and assigns the whole batch with one script.
4. On a timer, whether idle or busy: takes over the entries of dead routers, moves the calls of dead engines to other
   engines, ends calls past their deadline, unparks calls whose engine is ready, admits throttled calls, and moves
   waiting calls to idle engines.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from redis.exceptions import ResponseError

from rsm.broker.connection import execute
from rsm.broker.connection.dedicated import DedicatedConnection
from rsm.broker.connection.eviction import require_noeviction
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import OUTAGES, Backoff, require_access
from rsm.broker.protocol.codec import text
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.keys import ROUTER_GROUP, Keys
from rsm.broker.protocol.messages import Placement, Rejection
from rsm.broker.protocol.models import ErrorCode
from rsm.broker.protocol.scripts import Command
from rsm.broker.protocol.snapshot import SessionView
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings
from rsm.router.admission import Admission
from rsm.router.cost_model import costs_text
from rsm.router.intake import Arrival, Fields, read_entry, reject
from rsm.router.maintenance import Maintenance
from rsm.router.placement import PARKED, Chooser, Decision
from rsm.router.policies import Policy, create_policy
from rsm.router.work_stealing.loop import WorkStealer

log = logging.getLogger("rsm.router")

Entries = Sequence[tuple[bytes, Fields]]
# The maximum age of a snapshot of the fleet. Between two snapshots, a router counts only its own assignments. The next
# snapshot shows what other routers assigned and what engines finished.
_SNAPSHOT_S = 0.02
# Errors for a missing group: of a read, of a read that was blocking when the stream was deleted, and of XINFO.
_GROUP_IS_GONE = ("NOGROUP", "UNBLOCKED", "no such key")
_NO_RECORD = "The entry refers to a record that does not exist. Push an entry with a body, as `json` or `body`."


class Router:
    """One router. `run` serves until `stop` is called from another thread or a signal handler."""

    def __init__(self, settings: Settings | None = None, policy: Policy | None = None, name: str | None = None) -> None:
        self.settings = settings or Settings()
        self.keys = Keys(self.settings.namespace)
        self.name = name or f"router-{new_id()}"
        self._transitions = Transitions(self.keys, self.settings)
        admission = Admission(self.settings.admission_factor) if self.settings.admission else None
        self._chooser = Chooser(policy or create_policy(self.settings), admission)
        self._tick_s = self.settings.tick_ms / 1000
        self._connection = DedicatedConnection(self.settings, block_s=self._tick_s)
        self._redis = connect(self.settings)
        self._maintenance = Maintenance(self._redis, self.keys, self.settings, self.name)
        self._stealer = WorkStealer(self._redis, self._transitions, self._chooser) if self.settings.stealing else None
        self._seen_at = -_SNAPSHOT_S
        self._stopping = False
        self._server_checked = False

    def stop(self) -> None:
        """Makes `run` return after the current batch. Another router takes over the entries that it has not placed."""
        self._stopping = True

    def run(self) -> None:
        """Serves until `stop`. Waits while Redis does not answer.

        Raises:
            AccessDenied: Redis rejects this router's user at the start.
            EvictingRedis: Redis is configured to evict keys when its memory is full.
        """
        backoff, due = Backoff(self.name), 0.0
        ready = served = False
        while not self._stopping:
            try:
                if not ready:
                    self._prepare()
                    ready = served = True
                if time.monotonic() >= due:
                    due = time.monotonic() + self._tick_s
                    self.place(self._maintenance.tick())
                    if self._stealer is not None:
                        self._stealer.round(self._maintenance.engines)
                self.place(self._read())
            except OUTAGES as e:
                if not served:
                    require_access(e)
                ready = False
                self._maintenance.note_outage()
                time.sleep(backoff.pause(e))
            except ResponseError as e:
                if not any(sign in str(e) for sign in _GROUP_IS_GONE):
                    raise
                ready = False  # Redis lost its data, or the stream was deleted: create the group again
            else:
                backoff.recovered()
        self._maintenance.leave()
        self._redis.close()
        self._connection.close()

    def _prepare(self) -> None:
        """Creates the group at the beginning of the stream, so that it includes calls pushed before the first router.

        Checks the server only the first time, so that a failover does not end a running router.
        """
        if not self._server_checked:
            require_noeviction(self._redis)
            self._server_checked = True
        try:
            self._redis.xgroup_create(self.keys.calls, ROUTER_GROUP, id="0", mkstream=True)
        except ResponseError as e:
            if "BUSYGROUP" not in str(e):
                raise
        execute.load_all(self._connection)

    def _read(self) -> Entries:
        count, block = self.settings.batch, self.settings.tick_ms
        group = ("GROUP", ROUTER_GROUP, self.name, "COUNT", count, "BLOCK", block)
        return self._connection.read_stream("XREADGROUP", *group, "STREAMS", self.keys.calls, ">")

    def place(self, entries: Entries) -> int:
        """Places one batch. Returns how many entries it had. An entry that cannot be placed now stays pending."""
        if not entries:
            return 0
        arrivals, rejections = self._sort(entries)
        while arrivals or rejections:
            arrivals, rejections = self._place(arrivals, rejections)
        return len(entries)

    def _sort(self, entries: Entries) -> tuple[list[Arrival], list[Rejection]]:
        arrivals: list[Arrival] = []
        rejections: list[Rejection] = []
        for entry, fields in entries:
            # An entry that was deleted between the read and the claim has no fields.
            read = read_entry(text(entry), fields or {}, self.settings.max_body_bytes)
            (arrivals if isinstance(read, Arrival) else rejections).append(read)  # type: ignore[arg-type]
        return arrivals, rejections

    def _place(self, arrivals: list[Arrival], rejections: list[Rejection]) -> tuple[list[Arrival], list[Rejection]]:
        """Uses one round trip for a snapshot and one to act. Returns what must be placed or refused in a next round."""
        placements, refused = self._choose(arrivals, self._see(arrivals))
        commands: list[Command[Any]] = []
        raw = [a.raw for a in arrivals if a.raw is not None]
        if raw:
            commands.append(self._transitions.accept(raw))
        if rejections or refused:
            commands.append(self._transitions.reject([*rejections, *refused]))
        if placements:
            commands.append(self._transitions.assign(placements))
        replies = execute.run_all(self._connection, commands)
        for r in (*rejections, *refused):
            log.info("rejected call %s: %s", r.call_id or r.entry, r.error_code)
        return self._leftovers(arrivals, placements, replies[-1]) if placements else ([], [])

    def _see(self, arrivals: Sequence[Arrival]) -> dict[str, SessionView]:
        """Updates the view of the fleet, unless it is recent and has all requested models. Returns the sessions that
        the policy needs."""
        sessions = {a.view.session for a in arrivals if self._chooser.needs_session(a.view)}
        unserved = {a.view.model for a in arrivals if a.view.model} - self._chooser.models
        stale = bool(unserved) or time.monotonic() - self._seen_at > _SNAPSHOT_S
        if not (sessions or stale):
            return {}
        snapshot = execute.run(self._connection, self._transitions.snapshot(list(sessions), fleet=stale))
        if stale:
            self._chooser.see(snapshot.engines)
            self._seen_at = time.monotonic()
        return snapshot.sessions

    def _choose(
        self, arrivals: Sequence[Arrival], sessions: dict[str, SessionView]
    ) -> tuple[list[Placement], list[Rejection]]:
        placements, refused = [], []
        decisions = self._chooser.place([a.view for a in arrivals], sessions, time.monotonic())
        for a, d in zip(arrivals, decisions, strict=True):
            if d.refusal:
                refused.append(self._refuse(a, ErrorCode.NO_ENGINE_FOR_MODEL, d.refusal))
            else:
                placements.append(_placement(a, d))
        return placements, refused

    def _refuse(self, a: Arrival, code: ErrorCode, message: str) -> Rejection:
        inbox = a.raw.request.inbox if a.raw else ""
        return Rejection(a.entry, a.call_id, a.gen, a.view.session, inbox, code.value, message)

    def _leftovers(
        self, arrivals: Sequence[Arrival], placements: Sequence[Placement], placed: Sequence[Any]
    ) -> tuple[list[Arrival], list[Rejection]]:
        again: list[Arrival] = []
        refused: list[Rejection] = []
        by_entry = {a.entry: a for a in arrivals}
        for p, reply in zip(placements, placed, strict=True):
            a = by_entry[p.entry]
            if reply.code == "unplaced":
                self._seen_at = -_SNAPSHOT_S  # the view of the fleet is out of date
                again.append(a)
            elif reply.code == "missing" and a.raw is None:
                refused.append(reject(a.entry, {b"id": a.call_id.encode()}, ErrorCode.INVALID_REQUEST, _NO_RECORD))
        return again, refused


def _placement(a: Arrival, d: Decision) -> Placement:
    c = d.choice
    if c is None:
        return Placement(a.entry, a.call_id, a.gen, "", False, d.seen, None, PARKED)
    if c.throttle:
        return Placement(a.entry, a.call_id, a.gen, "", False, d.seen, None, c.why, throttle=True, context=d.context)
    costs = costs_text(c.costs, c.engine)
    placed = Placement(a.entry, a.call_id, a.gen, c.engine, c.bind, d.seen, c.hit, c.why, c.reuse, costs)
    return placed._replace(context=d.context, new=d.new)
