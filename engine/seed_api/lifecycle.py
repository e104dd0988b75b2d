"""`RequestLifecycleManager`: the life cycle of calls, a view of their records in Redis."""

from __future__ import annotations

from dataclasses import dataclass

import redis

from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect_view
from rsm.broker.errors import IllegalTransition, UnknownCall
from rsm.broker.protocol.ids import check_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.models import CallRecord, RequestState
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings
from rsm.broker.views.monitor import Monitor


@dataclass(frozen=True, slots=True)
class RequestMetadata:
    """A snapshot of a call's record, with the times derived from it. Seconds, on Redis's clock."""

    record: CallRecord
    now_ms: int

    @property
    def request_id(self) -> str:
        return self.record.request_id

    @property
    def session_id(self) -> str:
        return self.record.session_id

    @property
    def engine_id(self) -> str:
        return self.record.engine_id

    @property
    def state(self) -> RequestState:
        return self.record.state

    def get_waiting_time(self) -> float:
        """Time from submit to start; to the end if the call never started, to now if it still waits."""
        until = self.record.started_ms or self.record.finished_ms or self.now_ms
        return max(0, until - self.record.submitted_ms) / 1000

    def get_execution_time(self) -> float:
        """Time from start to end; to now if the call runs, 0 if it has not started."""
        if self.record.started_ms is None:
            return 0.0
        return max(0, (self.record.finished_ms or self.now_ms) - self.record.started_ms) / 1000

    def get_total_time(self) -> float:
        """Time from submit to end, or to now."""
        return max(0, (self.record.finished_ms or self.now_ms) - self.record.submitted_ms) / 1000


class RequestLifecycleManager:
    """Starts calls, changes their state and looks them up. It shares all records with routers and workers.

    Args:
        server: a Redis client with the broker's options. Default: a new one for `settings`.
    """

    def __init__(self, settings: Settings | None = None, *, server: redis.Redis | None = None) -> None:
        self._settings = settings or Settings()
        self._redis = server or connect_view(self._settings)
        self._transitions = Transitions(Keys(self._settings.namespace), self._settings)
        self._monitor = Monitor(self._settings, self._redis)

    def start_request(self, request_id: str, session_id: str, engine_id: str) -> RequestMetadata:
        """Creates a PENDING record for a call that the caller itself runs on `engine_id`.

        Raises:
            IllegalTransition: a call with this id exists.
        """
        for value, what in ((request_id, "request_id"), (session_id, "session_id"), (engine_id, "engine_id")):
            check_id(value, what)
        self._transition(request_id, RequestState.PENDING, session_id, engine_id)
        return self.get_request(request_id)

    def update_request_state(self, request_id: str, state: RequestState, reason: str = "") -> RequestMetadata:
        """Makes one legal transition: PENDING → RUNNING → COMPLETED, CANCELLED or FAILED. Pending calls may also end.

        Raises:
            IllegalTransition: the life cycle does not allow this transition.
            UnknownCall: there is no such call.
        """
        if RequestState(state) is RequestState.PENDING:
            raise IllegalTransition("A call cannot become PENDING again; only its worker can release a lost attempt.")
        self._transition(request_id, RequestState(state), reason=reason)
        return self.get_request(request_id)

    def cancel_request(self, request_id: str, reason: str = "") -> bool:
        """Cancels a call in any state; True if that took effect."""
        done = execute.run(self._redis, self._transitions.cancel(check_id(request_id, "request_id"), reason))
        return done in ("cancelled", "cancelling", "noted")

    def get_request(self, request_id: str) -> RequestMetadata:
        """The call's metadata. Raises UnknownCall if there is no such call."""
        return RequestMetadata(self._monitor.call(request_id), self._monitor.now_ms())

    def get_running_requests(self) -> list[RequestMetadata]:
        """The running calls, longest first: on all engines, and those that their callers run themselves."""
        now = self._monitor.now_ms()
        return [RequestMetadata(record, now) for record in self._monitor.running_calls()]

    def get_session_requests(self, session_id: str) -> list[RequestMetadata]:
        """A session's calls: the unfinished ones, then the latest finished ones that have not expired."""
        found = []
        for call_id in self._monitor.session_calls(session_id):
            try:
                found.append(self.get_request(call_id))
            except UnknownCall:
                continue  # expired in the meantime
        return found

    def _transition(
        self, call_id: str, state: RequestState, session: str = "", engine: str = "", reason: str = ""
    ) -> None:
        command = self._transitions.transition(call_id, state, session, engine, reason)
        legal, before = execute.run(self._redis, command)
        if legal:
            return
        if not before:
            raise UnknownCall(f"There is no call {call_id}; start_request creates one.")
        raise IllegalTransition(f"Call {call_id} is {before} and cannot become {state.value}.")
