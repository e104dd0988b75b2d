"""Programs: the process table of the Autellix paper (section 4.2.1), backed by the session records in Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis

from broker import scripts
from broker.connection import connect
from broker.errors import RsmError
from broker.ids import check_id, new_id
from broker.keys import Keys
from broker.monitor import Monitor
from broker.settings import Settings
from broker.transitions import Transitions


class GlobalProcessTable:
    """One entry per program: attained service, waiting, calls by state, engine. Correct with any number of writers.

    Workers charge the calls they run by themselves (tokens: uncached prompt + 2 x completion); `update_program_metrics`
    is for programs that spend service elsewhere.
    """

    def __init__(self, settings: Settings | None = None, *, server: redis.Redis | None = None) -> None:
        self.settings = settings or Settings()
        self._redis = server or connect(self.settings)
        self._transitions = Transitions(Keys(self.settings.namespace), self.settings)
        self._monitor = Monitor(self.settings, self._redis)

    def get(self, session_id: str) -> dict[str, Any]:
        """The entry of a program; see `Monitor.session`. Raises UnknownCall if there is none."""
        return self._monitor.session(session_id)

    def programs(self) -> list[dict[str, Any]]:
        """All entries, most attained service first."""
        return self._monitor.sessions()

    def update_program_metrics(self, pid: str, call_id: str, service_time: float, waiting_time: float) -> float:
        """Charges one finished call; returns the program's attained service.

        service = max(service, inherited + service_time) (Algorithm 1, line 4), where `inherited` is what the call's
        record took over when it was assigned, or the program's present service if there is no such record.

        Args:
            service_time: in the table's unit (service tokens, unless a deployment uses another).
            waiting_time: seconds.
        """
        key = Keys(self.settings.namespace).call(check_id(call_id, "call_id"))
        inherited = self._redis.hget(key, "inherited")
        value = inherited.decode() if isinstance(inherited, bytes) else ""
        return self._run("charge", check_id(pid, "pid"), value, service_time, waiting_time * 1000)

    def start(self, session_id: str) -> bool:
        """Makes an entry; False if the program has one."""
        return bool(self._run("start", check_id(session_id, "session")))

    def end(self, session_id: str) -> bool:
        """Removes the entry and what is known of the program's caches; False while it has unfinished calls."""
        return self._run("end", check_id(session_id, "session")) == 0

    def _run(self, op: str, session: str, *args: str | float) -> int:
        return scripts.run(self._redis, self._transitions.session(op, session, *args))


class SessionManager:
    """Begins and ends programs.

    with SessionManager(table) as session_id: ...
    """

    def __init__(self, process_table: GlobalProcessTable | None = None) -> None:
        self.process_table = process_table or GlobalProcessTable()
        self._open: list[str] = []

    def start_session(self, session_id: str | None = None) -> str:
        """Makes a program's entry and returns its id.

        Raises:
            RsmError: a program with this id exists.
        """
        chosen = session_id or new_id()
        if not self.process_table.start(chosen):
            raise RsmError(f"A session {chosen} exists already; choose another id.")
        return chosen

    def end_session(self, session_id: str) -> bool:
        """Removes the entry; False while calls of the program are unfinished (it then expires when idle)."""
        return self.process_table.end(session_id)

    @contextmanager
    def session(self, session_id: str | None = None) -> Iterator[str]:
        """A program for the length of a block."""
        chosen = self.start_session(session_id)
        try:
            yield chosen
        finally:
            self.end_session(chosen)

    def __enter__(self) -> str:
        self._open.append(self.start_session())
        return self._open[-1]

    def __exit__(self, *_: object) -> None:
        self.end_session(self._open.pop())
