"""Cancels a session and its descendants, session by session, for both kinds of clients."""

from __future__ import annotations

from rsm.broker.protocol.ids import check_id
from rsm.broker.protocol.messages import SessionCancel
from rsm.broker.protocol.scripts import Command
from rsm.broker.protocol.transitions import Transitions


class TreeCancel:
    """Cancels the calls of a session and of its descendants. Send each `command` until there is none, and pass each
    reply to `take`.

    A session is cancelled before its children, so a call that a bare XADD pushes meanwhile cannot escape.
    """

    def __init__(self, transitions: Transitions, session: str, reason: str, descendants: bool) -> None:
        self.ended = 0
        self._transitions = transitions
        self._reason = reason
        self._descendants = descendants
        self._seen = {check_id(session, "session")}
        self._waiting = [session]
        self._cursor = "0"

    def command(self) -> Command[SessionCancel] | None:
        if not self._waiting:
            return None
        session = self._waiting[-1]
        return self._transitions.cancel_session(session, self._reason, self._cursor, self._descendants)

    def take(self, reply: SessionCancel) -> None:
        self.ended += reply.ended
        self._cursor = reply.cursor
        if self._cursor == "0":
            self._waiting.pop()
            self._waiting += [child for child in reply.children if child not in self._seen]
            self._seen.update(reply.children)
