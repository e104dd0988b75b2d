"""Dead letters: calls that used up their attempts, and entries that could not become calls, for people to look at.

A letter keeps the call's body, so the call can be replayed even after its record has expired. Bodies contain prompts,
so this module shows only their sizes.
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
# Letters include bodies of up to megabytes, so only a few are read at once.
_PAGE = 20
_MAX_ID = 128
_ALL = 1_000_000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One entry of the dead-letter stream. `died_ms`: epoch milliseconds on Redis's clock."""

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
        """Whether its body was kept. The large body of a refused entry is not kept."""
        return self.body_bytes > 0

    def summary(self) -> dict[str, Any]:
        """Everything except the body, for display."""
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
    """The outcome of `replay_all`. `sent`: how many calls were pushed. `failures`: error messages. `bodiless`: how
    many letters have no body, and stay."""

    sent: int
    failures: list[str]
    bodiless: int


class DeadLetters:
    """The dead letters of one namespace.

    Args:
        server: a client with the broker's options. Default: a new one for `settings`.
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
        """One letter, by the id of its entry; or the newest letter of a call, by the call's id.

        Raises:
            UnknownCall: there is none.
        """
        letter = self._entry(ref) if _ENTRY.fullmatch(ref) else None
        # A bare XADD without an id creates a call whose id looks like that of an entry.
        letter = letter or next((each for each in self._newest_first() if each.request_id == ref), None)
        if letter is None:
            raise UnknownCall(f"There is no dead letter {ref}; `rsm dead ls` lists them.")
        return letter

    def replay(self, ref: str) -> str:
        """Pushes a dead call again and deletes its letter. Returns the id of the new call.

        The id is the old one if the old record is gone, else `ID.replay-ENTRY`. The letter is deleted only after the
        push, and the id depends only on the letter. So an interrupted replay can be repeated without running the call
        twice.

        Raises:
            UnknownCall: there is no such letter.
            InvalidRequest: its body was not kept.
            Overloaded: a limit on open calls is reached; the letter stays.
        """
        entry = self.show(ref).entry
        letter = self._entry(entry, with_body=True)
        if letter is None:
            raise UnknownCall(f"Dead letter {entry} is gone; another command has replayed or deleted it.")
        if not letter.replayable:
            raise InvalidRequest(f"Dead letter {entry} has no body ({letter.error_code}). Submit the call again.")
        call_id = next(i for i in self._candidates(letter) if self._push(i, letter))
        execute.run(self._redis, self._transitions.discard(entry))
        return call_id

    def replay_all(self) -> Replayed:
        """Replays all letters that have a body, oldest first."""
        letters = self.ls(_ALL)
        replayable = [letter for letter in reversed(letters) if letter.replayable]
        failures = []
        for letter in replayable:
            try:
                self.replay(letter.entry)
            except RsmError as e:
                failures.append(str(e))
        return Replayed(len(replayable) - len(failures), failures, len(letters) - len(replayable))

    def _candidates(self, letter: DeadLetter) -> Iterator[str]:
        gen = text(self._redis.hget(self.keys.call(letter.request_id), "gen"))
        # There is no record, or a newer one than the letter's, which an earlier try of this replay may have created.
        if letter.request_id and (not gen or letter.gen not in (None, gen)):
            yield letter.request_id
        tail = f".replay-{letter.entry}"
        yield (letter.request_id[: _MAX_ID - len(tail)] + tail).lstrip(".")
        raise InvalidRequest(
            f"The ids for a replay of dead letter {letter.entry} now belong to other calls. "
            "Submit the call again with a new id."
        )

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
        """The call as it was, but without its deadline, which has passed or soon will.

        Raises:
            InvalidRequest: it was refused, and would be refused again.
        """
        kind = letter.kind or "generate"
        if kind not in KINDS:
            raise InvalidRequest(
                f"Dead letter {letter.entry} has an unknown kind. Submit the call again as one of {', '.join(KINDS)}."
            )
        body = codec.decode(letter.body, letter.body_field)
        check_body(kind, body)
        return check_request(
            id=check_id(call_id, "id"),
            # The session of a call without one is the call's own id.
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
