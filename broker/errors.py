"""Every error that rsm-engine raises on purpose.

RsmError
├── InvalidRequest (ValueError)     the call can never run as given; the message says what to change
├── Conflict                        the id already belongs to a different call
├── Overloaded                      a limit on open calls is reached; says when to try again
├── NotReplicated                   the call was pushed, but too few replicas confirmed it
├── CallEnded                       a call reached a terminal state without a result; carries the record (models.py)
│   ├── CallCancelled
│   └── CallFailed                  .error_code is one of the closed set `ErrorCode`
├── BadRecord                       the data of a call in Redis cannot be read
├── UnknownCall (KeyError)          no record: never submitted, or expired after the result TTL
│   └── CallLost                    the call was accepted, but Redis has lost its record
├── IllegalTransition               a state change that the life cycle does not allow
├── EngineIdTaken                   another live worker holds this engine id
├── EvictingRedis                   Redis is configured to evict keys when its memory is full
├── EngineFailed                    an engine did not start, or died
└── BrokerUnavailable               Redis could not be reached in time
    └── AccessDenied                Redis rejects this user's credentials or permissions
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RsmError(Exception):
    """Base class of all errors raised on purpose."""


class InvalidRequest(RsmError, ValueError):
    """The call can never run as given."""


class Conflict(RsmError):
    """The id already belongs to a call with another kind, model or body."""


class Overloaded(RsmError):
    """A limit on open calls is reached. Refused calls leave no trace, so they can be submitted again unchanged.

    Attributes:
        retry_after: seconds to wait, estimated from the present rate; 0 = the call's deadline has passed.
        bound: the limit that is reached: "open_calls", "open_bytes", "session_calls" or "session_bytes".
        setting: the variable that sets this limit.
        accepted: handles of the accepted calls of a `submit_many`, in order (`CallHandle` or `AsyncCall`).
        refused: its other calls (`Submission`), for the next `submit_many`.
    """

    def __init__(
        self,
        bound: str,
        retry_after: float,
        accepted: Sequence[Any] = (),
        refused: Sequence[Any] = (),
    ) -> None:
        self.bound = bound
        self.retry_after = retry_after
        self.setting = f"RSM_MAX_{bound.upper()}"
        self.accepted = list(accepted)
        self.refused = list(refused)
        advice = f"Try again in {retry_after:g} s" if retry_after else "The call's deadline has passed"
        super().__init__(f"The broker accepts no more calls: the limit {self.setting} is reached. {advice}.")


class NotReplicated(RsmError):
    """Fewer replicas than `RSM_WAIT_REPLICAS` confirmed the push in time. A failover now could lose it.

    The calls are pushed and will run. Submitting them again with the same ids is safe, and waits for the replicas
    again.

    Attributes:
        call_ids: the calls in question.
        replicas: how many replicas confirmed them.
        wanted: how many were required.
    """

    def __init__(self, call_ids: Sequence[str], replicas: int, wanted: int) -> None:
        self.call_ids = list(call_ids)
        self.replicas = replicas
        self.wanted = wanted
        shown = self.call_ids[0] if len(self.call_ids) == 1 else f"{self.call_ids[0]} and {len(self.call_ids) - 1} more"
        super().__init__(
            f"Call {shown}: pushed, but only {replicas} of {wanted} replicas confirmed it in time (RSM_WAIT_REPLICAS). "
            "Submit again with the same id to wait again."
        )


class UnknownCall(RsmError, KeyError):
    """There is no record with this id."""

    def __str__(self) -> str:
        return str(self.args[0])


class BadRecord(RsmError):
    """The data of a call in Redis cannot be read: another program has written there."""


class CallLost(UnknownCall):
    """An accepted call has no record any more, and this client did not receive its end."""

    def __init__(self, call_id: str) -> None:
        super().__init__(
            f"Redis no longer has a record of call {call_id}. Either a failover or a restart lost it, or it expired "
            "before this client received the call's end. Submit it again; the same id is fine."
        )


class IllegalTransition(RsmError):
    """The life cycle does not allow this state change."""


class EngineIdTaken(RsmError):
    """Another live worker holds this engine id."""


class EvictingRedis(RsmError):
    """Redis is configured to evict keys when its memory is full, so accepted calls could vanish."""


class EngineFailed(RsmError):
    """An engine did not start, or died."""


class BrokerUnavailable(RsmError):
    """Redis could not be reached in time."""


class AccessDenied(BrokerUnavailable):
    """Redis rejects this user's credentials or permissions; the message says which."""
