"""What the clients share: building a call from its options, and reading Redis's replies. No I/O here.

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

CLOSED = "The client is closed. The calls that it pushed continue."
CLOSED_WHILE_AWAITED = "The client was closed while this call was awaited. The call continues."
OPEN_STATES = (b"PENDING", b"RUNNING")

_clients: weakref.WeakSet[ClientCore] = weakref.WeakSet()


class ClientCore:
    """The base class of both clients. Takes the same arguments as `rsm.Client`."""

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

    def _open_resources(self) -> None:
        """Opens the resources of one process: when the client is created, and again in a forked child.

        Connections and threads belong to the process that made them, and an inbox has only one reader.
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
        """A checked and encoded call for `submit_many`. Takes the same arguments as `submit`.

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
        """The error for a refused call; None if it was accepted, or refused as overloaded."""
        if reply.code == "conflict":
            return Conflict(f"The id {call_id} already belongs to a different call. Choose a new id.")
        return InvalidRequest(reply.error) if reply.code == "invalid" else None

    def _too_few(self, call_ids: list[str], acks: int) -> NotReplicated | None:
        """The error for calls that were pushed but confirmed by fewer replicas than required."""
        wanted = self.settings.wait_replicas
        return NotReplicated(call_ids, acks, wanted) if call_ids and acks < wanted else None

    def _record(self, call_id: str, found: Mapping[bytes, bytes]) -> CallRecord:
        """Reads a call's hash. Raises UnknownCall if it is not a record."""
        if b"state" not in found:
            raise UnknownCall(f"There is no call {call_id}; records expire after {self.settings.result_ttl_s} s.")
        return CallRecord.from_hash(call_id, found)

    def _record_of_end(self, call_id: str, end: Mapping[bytes, bytes]) -> CallRecord | None:
        """The record that the event of an end contains; None if it must be read from Redis.

        Raises:
            CallLost: there is no record.
        """
        if not end:  # the reconciler found no record
            raise CallLost(call_id)
        return end_record(call_id, end)

    def _require_stream(self, record: CallRecord) -> None:
        """Raises UnknownCall if the call has no chunks."""
        if not record.stream:
            raise UnknownCall(f"Call {record.request_id} was submitted without stream=True, so it has no chunks.")


def took_effect(cancel: str) -> bool:
    """Whether the reply of the cancel script means that the call is, or will in a moment be, CANCELLED."""
    return cancel in ("cancelled", "cancelling", "noted")


def epoch_ms(time_reply: tuple[int, int], seconds: float) -> int:
    """The time `seconds` after a reply of TIME, in epoch milliseconds."""
    now, micros = time_reply
    return int(now * 1000 + micros // 1000 + seconds * 1000)


def checked(call_id: str) -> str:
    return check_id(call_id, "id")


def _reopen_clients() -> None:
    for client in list(_clients):
        client._open_resources()


os.register_at_fork(after_in_child=_reopen_clients)
