"""Dead letters: calls that used up their attempts, and entries of which no record could be made; for people to judge.

A letter keeps the call's body, so it can be sent again even after its record has expired. Bodies are prompts: nothing
here shows one, only its size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import redis

from rsm.broker.client.request import check_body, check_request, estimate_tokens
from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect_view
from rsm.broker.errors import InvalidRequest, Overloaded, RsmError, UnknownCall
from rsm.broker.protocol import codec
from rsm.broker.protocol.codec import number, text
from rsm.broker.protocol.ids import check_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.messages import Submission
from rsm.broker.protocol.models import KINDS, CallRequest
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings

_ENTRY = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")
# Letters come with their bodies, of up to megabytes each, so few are read at once.
_PAGE = 20
_MAX_ID = 128
_ALL = 1_000_000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One entry of the stream of dead letters. `died_ms` is epoch milliseconds on Redis's clock."""

    entry: str
    request_id: str
    error_code: str
    error: str
    session_id: str
    kind: str
    model: str
    attempts: int
    died_ms: int
    body_bytes: int
    body_field: codec.Format = "body"
    body: bytes = field(default=b"", repr=False)
    priority: str = "0"
    stream: bool = False
    prompt_tokens: int = 0
    traceparent: str = ""
    on_engine_loss: str = "continue"
    parent_session: str = ""
    gen: str | None = None

    @property
    def replayable(self) -> bool:
        """Whether its body was kept; that of a refused entry is not if it is large."""
        return self.body_bytes > 0

    def summary(self) -> dict[str, Any]:
        """What may be shown: everything but the body."""
        return {
            "entry": self.entry,
            "request_id": self.request_id,
            "error_code": self.error_code,
            "error": self.error,
            "session_id": self.session_id,
            "kind": self.kind,
            "model": self.model,
            "attempts": self.attempts,
            "priority": self.priority,
            "stream": self.stream,
            "on_engine_loss": self.on_engine_loss,
            "parent_session": self.parent_session,
            "died_ms": self.died_ms,
            "body_bytes": self.body_bytes,
            "replayable": self.replayable,
        }


class Replayed(NamedTuple):
    """What became of all letters: `sent` again; `failures`, a sentence each; `bodiless` ones stay."""

    sent: int
    failures: list[str]
    bodiless: int


class DeadLetters:
    """The dead letters of one namespace.

    Args:
        server: a client with the broker's options; none = a new one for `settings`.
    """

    def __init__(self, settings: Settings | None = None, server: redis.Redis | None = None) -> None:
        self.settings = settings or Settings()
        self.keys = Keys(self.settings.namespace)
        self._redis: Any = server or connect_view(self.settings)
        self._transitions = Transitions(self.keys, self.settings)

    def count(self) -> int:
        return int(self._redis.xlen(self.keys.dead))

    def ls(self, limit: int = 100) -> list[DeadLetter]:
        """The latest letters, newest first, without their bodies."""
        found: list[DeadLetter] = []
        for letter in self._newest_first():
            if len(found) == limit:
                break
            found.append(letter)
        return found

    def show(self, ref: str) -> DeadLetter:
        """One letter, by the id of its entry, or the newest one of a call.

        Raises:
            UnknownCall: there is none.
        """
        letter = self._entry(ref) if _ENTRY.fullmatch(ref) else None
        # A bare XADD without an id makes a call whose id looks like an entry's.
        letter = letter or next((each for each in self._newest_first() if each.request_id == ref), None)
        if letter is None:
            raise UnknownCall(f"There is no dead letter {ref}; `rsm dead ls` shows them.")
        return letter

    def replay(self, ref: str) -> str:
        """Sends a dead call again and removes its letter; returns the id under which it runs now.

        That is its own id if its record is gone, else `ID.replay-ENTRY`. The letter goes only after the push, and the
        id depends on the letter alone, so a replay that was interrupted may be repeated: the call is not run twice.

        Raises:
            UnknownCall: there is no such letter.
            InvalidRequest: its body was not kept.
            Overloaded: there is no room for it now; the letter stays.
        """
        entry = self.show(ref).entry
        letter = self._entry(entry, with_body=True)
        if letter is None:
            raise UnknownCall(f"Dead letter {entry} is gone; somebody else was faster.")
        if not letter.replayable:
            raise InvalidRequest(f"Dead letter {entry} keeps no body ({letter.error_code}): send the call anew.")
        call_id = next(i for i in self._candidates(letter) if self._push(i, letter))
        execute.run(self._redis, self._transitions.discard(entry))
        return call_id

    def replay_all(self) -> Replayed:
        """Sends all calls again whose letters keep a body, oldest first, as they came."""
        found = self.ls(_ALL)
        kept = [letter for letter in reversed(found) if letter.replayable]
        failures = []
        for letter in kept:
            try:
                self.replay(letter.entry)
            except RsmError as e:
                failures.append(str(e))
        return Replayed(len(kept) - len(failures), failures, len(found) - len(kept))

    def _candidates(self, letter: DeadLetter) -> Iterator[str]:
        gen = text(self._redis.hget(self.keys.call(letter.request_id), "gen"))
        # No record, or not the one of when the letter was written: an earlier try of this replay may have made it.
        if letter.request_id and (not gen or letter.gen not in (None, gen)):
            yield letter.request_id
        tail = f".replay-{letter.entry}"
        yield (letter.request_id[: _MAX_ID - len(tail)] + tail).lstrip(".")
        raise InvalidRequest(f"The ids of dead letter {letter.entry} belong to other calls by now.")

    def _push(self, call_id: str, letter: DeadLetter) -> bool:
        """False if the id belongs to another call."""
        request = self._request(call_id, letter)
        digest = codec.digest(request.kind, request.model, letter.body)
        command = self._transitions.submit([Submission(request, digest, letter.body, letter.body_field)])
        reply = execute.run(self._redis, command)[0]
        if reply.code == "overloaded":
            raise Overloaded(reply.bound, reply.retry_ms / 1000)
        if reply.code == "invalid":
            raise InvalidRequest(reply.error)
        return reply.code != "conflict"

    def _request(self, call_id: str, letter: DeadLetter) -> CallRequest:
        """The call as it was, but for its deadline, which has passed or soon will.

        Raises:
            InvalidRequest: it was refused, and would be again.
        """
        kind = letter.kind or "generate"
        if kind not in KINDS:
            raise InvalidRequest(f"Dead letter {letter.entry} has no kind that there is: send the call anew.")
        body = codec.decode(letter.body, letter.body_field)
        check_body(kind, body)
        return check_request(
            id=check_id(call_id, "id"),
            # A call without a session was its own, and is again.
            session=letter.session_id if letter.session_id not in ("", letter.request_id) else call_id,
            kind=kind,
            model=letter.model,
            priority=letter.priority,
            stream=letter.stream,
            prompt_tokens=letter.prompt_tokens or estimate_tokens(body, len(letter.body)),
            traceparent=letter.traceparent,
            on_engine_loss=letter.on_engine_loss,
            parent_session=letter.parent_session,
        )

    def _entry(self, entry: str, with_body: bool = False) -> DeadLetter | None:
        found = self._redis.xrange(self.keys.dead, entry, entry)
        return _letter(found[0][0], found[0][1], with_body) if found else None

    def _newest_first(self) -> Iterator[DeadLetter]:
        last = "+"
        while page := self._redis.xrevrange(self.keys.dead, last, "-", count=_PAGE):
            for entry, fields in page:
                yield _letter(entry, fields)
            last = f"({text(page[-1][0])}"


def _letter(entry: bytes, fields: Mapping[bytes, bytes], with_body: bool = False) -> DeadLetter:
    form: codec.Format = "json" if b"json" in fields else "body"
    body = fields.get(form.encode(), b"")
    return DeadLetter(
        entry=text(entry),
        request_id=text(fields.get(b"id")),
        error_code=text(fields.get(b"error_code")),
        error=text(fields.get(b"error")),
        session_id=text(fields.get(b"session")),
        kind=text(fields.get(b"kind")),
        model=text(fields.get(b"model")),
        attempts=number(fields.get(b"attempts")),
        died_ms=number(text(entry).partition("-")[0]),
        priority=text(fields.get(b"priority")) or "0",
        stream=fields.get(b"stream") == b"1",
        prompt_tokens=number(fields.get(b"prompt_tokens")),
        traceparent=text(fields.get(b"traceparent")),
        on_engine_loss=text(fields.get(b"on_engine_loss")) or "continue",
        parent_session=text(fields.get(b"parent_session")),
        gen=text(fields[b"gen"]) if b"gen" in fields else None,
        body_bytes=len(body),
        body_field=form,
        body=body if with_body else b"",
    )
