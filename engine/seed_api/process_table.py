"""The process table of the Autellix paper (section 4.2.1), stored in the session records in Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis

from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect_view
from rsm.broker.errors import RsmError
from rsm.broker.protocol.ids import check_id, new_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings
from rsm.broker.views.monitor import Monitor


class GlobalProcessTable:
    """One entry per session. Service, waiting and running time are in the entry of a program's root. Safe with any
    number of writers.

    Workers charge the calls that they run (RSM_SERVICE_UNIT); `update_program_metrics` is for programs that use service
    elsewhere.
    """

    def __init__(self, settings: Settings | None = None, *, server: redis.Redis | None = None) -> None:
        self.settings = settings or Settings()
        self._redis = server or connect_view(self.settings)
        self._transitions = Transitions(Keys(self.settings.namespace), self.settings)
        self._monitor = Monitor(self.settings, self._redis)

    def get(self, session_id: str) -> dict[str, Any]:
        """The entry of a program; see `Monitor.session`. Raises UnknownCall if there is none."""
        return self._monitor.session(session_id)

    def programs(self) -> list[dict[str, Any]]:
        """All entries, most attained service first."""
        return self._monitor.sessions()

    def update_program_metrics(
        self, pid: str, call_id: str, service_time: float, waiting_time: float, running_time: float = 0.0
    ) -> float:
        """Charges one finished call; returns the program's attained service.

        service = max(service, inherited + service_time) (Algorithm 1, line 4), where `inherited` is the program's
        service when the call was assigned, or its current service if no router assigned it. Waiting and running time
        follow the same rule.

        Args:
            pid: a session; its program is charged.
            service_time: in the table's unit (RSM_SERVICE_UNIT).
            waiting_time: seconds.
            running_time: seconds.
        """
        times = (service_time, waiting_time * 1000, running_time * 1000)
        return self._run("charge", check_id(pid, "pid"), check_id(call_id, "call_id"), *times)

    def start(self, session_id: str, parent: str | None = None) -> bool:
        """Creates an entry, with `parent` for its sub-agent; False if it exists.

        Raises:
            InvalidRequest: the session cannot be a child of that parent, such as an ancestor of it.
        """
        parent_id = "" if parent is None else check_id(parent, "parent")
        return bool(self._run("start", check_id(session_id, "session"), parent_id))

    def end(self, session_id: str) -> bool:
        """Removes the entry and the session's affinity; False while it or a descendant has unfinished calls."""
        return self._run("end", check_id(session_id, "session")) == 0

    def _run(self, op: str, session: str, *args: str | float) -> int:
        return execute.run(self._redis, self._transitions.session(op, session, *args))


class SessionManager:
    """Starts and ends programs.

    with SessionManager(table) as session_id: ...
    """

    def __init__(self, process_table: GlobalProcessTable | None = None) -> None:
        self.process_table = process_table or GlobalProcessTable()
        self._open: list[str] = []

    def start_session(self, session_id: str | None = None, *, parent: str | None = None) -> str:
        """Creates a session's entry and returns its id.

        Args:
            parent: the session for which this one works as a sub-agent. Its program is charged for this one.

        Raises:
            RsmError: a session with this id exists.
            InvalidRequest: it cannot be a child of that parent.
        """
        chosen = session_id or new_id()
        if not self.process_table.start(chosen, parent):
            raise RsmError(f"A session {chosen} already exists; choose another id.")
        return chosen

    def end_session(self, session_id: str) -> bool:
        """Removes the entry; False while the program has unfinished calls (it then expires when idle)."""
        return self.process_table.end(session_id)

    @contextmanager
    def session(self, session_id: str | None = None, *, parent: str | None = None) -> Iterator[str]:
        """A context with a session."""
        chosen = self.start_session(session_id, parent=parent)
        try:
            yield chosen
        finally:
            self.end_session(chosen)

    def __enter__(self) -> str:
        self._open.append(self.start_session())
        return self._open[-1]

    def __exit__(self, *_: object) -> None:
        self.end_session(self._open.pop())
