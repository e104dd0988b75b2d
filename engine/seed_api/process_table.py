"""Programs: the process table of the Autellix paper (section 4.2.1), backed by the session records in Redis."""

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
    """One entry per session; service, waiting and running stand in that of a program's root. Correct with any number of
    writers.

    Workers charge the calls they run by themselves (RSM_SERVICE_UNIT); `update_program_metrics` is for programs that
    spend service elsewhere.
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

        service = max(service, inherited + service_time) (Algorithm 1, line 4), where `inherited` is what the call's
        record took over when it was assigned, or the program's present service if no router assigned it. Waiting and
        running follow the same rule.

        Args:
            pid: a session; its program is charged.
            service_time: in the table's unit (RSM_SERVICE_UNIT).
            waiting_time: seconds.
            running_time: seconds.
        """
        times = (service_time, waiting_time * 1000, running_time * 1000)
        return self._run("charge", check_id(pid, "pid"), check_id(call_id, "call_id"), *times)

    def start(self, session_id: str, parent: str | None = None) -> bool:
        """Makes an entry, of a sub-agent of `parent` if one is given; False if there is one already.

        Raises:
            InvalidRequest: the session cannot be a child of that parent, such as an ancestor of it.
        """
        told = "" if parent is None else check_id(parent, "parent")
        return bool(self._run("start", check_id(session_id, "session"), told))

    def end(self, session_id: str) -> bool:
        """Removes the entry and what is known of the session's caches; False while it, or a descendant, has unfinished
        calls."""
        return self._run("end", check_id(session_id, "session")) == 0

    def _run(self, op: str, session: str, *args: str | float) -> int:
        return execute.run(self._redis, self._transitions.session(op, session, *args))


class SessionManager:
    """Begins and ends programs.

    with SessionManager(table) as session_id: ...
    """

    def __init__(self, process_table: GlobalProcessTable | None = None) -> None:
        self.process_table = process_table or GlobalProcessTable()
        self._open: list[str] = []

    def start_session(self, session_id: str | None = None, *, parent: str | None = None) -> str:
        """Makes a session's entry and returns its id.

        Args:
            parent: the session that this one works for, as its sub-agent: what it costs is its program's.

        Raises:
            RsmError: a session with this id exists.
            InvalidRequest: it cannot be a child of that parent.
        """
        chosen = session_id or new_id()
        if not self.process_table.start(chosen, parent):
            raise RsmError(f"A session {chosen} exists already; choose another id.")
        return chosen

    def end_session(self, session_id: str) -> bool:
        """Removes the entry; False while calls of the program are unfinished (it then expires when idle)."""
        return self.process_table.end(session_id)

    @contextmanager
    def session(self, session_id: str | None = None, *, parent: str | None = None) -> Iterator[str]:
        """A session for the length of a block."""
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
