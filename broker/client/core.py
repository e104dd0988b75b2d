"""What the clients share: a call's way from its options to what Redis said of it. No I/O here.

`Client` (sync.py) and `AsyncClient` (aio.py) are thin shells around it, with the same names and signatures.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import Any

from rsm.broker.client.backpressure import OnOverload, Patience
from rsm.broker.client.request import Prompt, build
from rsm.broker.errors import CallLost, Conflict, InvalidRequest, NotReplicated, RsmError, UnknownCall
from rsm.broker.protocol.events import end_record
from rsm.broker.protocol.ids import check_id, new_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.messages import Submission, Submitted
from rsm.broker.protocol.models import CallRecord, OnEngineLoss
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings

CLOSED = "The client is closed; the calls it pushed go on."
CLOSED_WHILE_AWAITED = "The client was closed while the call was awaited; the call goes on."
OPEN_STATES = (b"PENDING", b"RUNNING")

_clients: weakref.WeakSet[ClientCore] = weakref.WeakSet()


class ClientCore:
    """Arguments as `rsm.Client`."""

    def __init__(
        self,
        redis_url: str | None,
        namespace: str | None,
        settings: Settings | None,
        redis_timeout: float,
        on_overload: OnOverload,
        overload_timeout: float | None,
    ) -> None:
        self.settings = (settings or Settings()).with_redis(redis_url, namespace)
        self.keys = Keys(self.settings.namespace)
        self.transitions = Transitions(self.keys, self.settings)
        self._redis_timeout = redis_timeout
        self._on_overload, self._overload_timeout = on_overload, overload_timeout
        self._inbox = new_id()
        _clients.add(self)

    def _begin(self) -> None:
        """Opens what this process needs for itself: once when the client is made, and again in a process forked later.

        Connections and threads stay with the process that made them, and an inbox has one reader.
        """
        self._inbox = new_id()

    def prepare(
        self,
        /,
        prompt: Prompt,
        *,
        session: str | None = None,
        kind: str = "generate",
        id: str | None = None,  # noqa: A002
        model: str = "",
        priority: int = 0,
        timeout: float | None = None,
        deadline_ms: int | None = None,
        stream: bool = False,
        prompt_tokens: int | None = None,
        traceparent: str = "",
        on_engine_loss: OnEngineLoss = "continue",
        parent_session: str | None = None,
        **params: Any,
    ) -> Submission:
        """A checked and encoded call for `submit_many`; takes what `submit` takes.

        Raises:
            InvalidRequest: the call can never run.
        """
        return build(
            prompt,
            max_body_bytes=self.settings.max_body_bytes,
            inbox=self._inbox,
            id=id,
            session=session,
            kind=kind,
            model=model,
            priority=priority,
            timeout=timeout,
            deadline_ms=deadline_ms,
            stream=stream,
            prompt_tokens=prompt_tokens,
            traceparent=traceparent,
            on_engine_loss=on_engine_loss,
            parent_session=parent_session,
            params=params,
        )

    def _patience(self, on_overload: OnOverload | None) -> Patience:
        return Patience(on_overload or self._on_overload, self._overload_timeout)

    def _refusal(self, call_id: str, reply: Submitted) -> RsmError | None:
        """Why a call was not taken, room aside; None if it was, or there was no room."""
        if reply.code == "conflict":
            return Conflict(f"The id {call_id} belongs to another call with another body; choose a new id.")
        return InvalidRequest(reply.error) if reply.code == "invalid" else None

    def _too_few(self, call_ids: list[str], acks: int) -> NotReplicated | None:
        """The error for calls that are pushed, if fewer replicas have them than was asked for."""
        wanted = self.settings.wait_replicas
        return NotReplicated(call_ids, acks, wanted) if call_ids and acks < wanted else None

    def _record(self, call_id: str, found: Mapping[bytes, bytes]) -> CallRecord:
        """Raises UnknownCall if what was found is no record."""
        if b"state" not in found:
            raise UnknownCall(f"There is no call {call_id}; records expire after {self.settings.result_ttl_s} s.")
        return CallRecord.from_hash(call_id, found)

    def _reported(self, call_id: str, end: Mapping[bytes, bytes]) -> CallRecord | None:
        """The record as an end that was reported has it; None if its record must be asked.

        Raises:
            CallLost: there is no record.
        """
        if not end:  # the reconciler found none
            raise CallLost(call_id)
        return end_record(call_id, end)

    def _require_stream(self, record: CallRecord) -> None:
        """Raises UnknownCall if the call keeps no chunks."""
        if not record.stream:
            raise UnknownCall(f"Call {record.request_id} was submitted without stream=True, so it keeps no chunks.")


def took_effect(cancel: str) -> bool:
    """Whether what the cancel script answered means that the call is, or will at once be, CANCELLED."""
    return cancel in ("cancelled", "cancelling", "noted")


def epoch_ms(time_reply: tuple[int, int], seconds: float) -> int:
    """The moment so many seconds after what TIME answered."""
    now, micros = time_reply
    return int(now * 1000 + micros // 1000 + seconds * 1000)


def checked(call_id: str) -> str:
    return check_id(call_id, "id")


def _begin_anew() -> None:
    for client in list(_clients):
        client._begin()


os.register_at_fork(after_in_child=_begin_anew)
