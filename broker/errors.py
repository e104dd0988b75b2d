"""Every error that rsm-engine raises on purpose.

RsmError
├── InvalidRequest (ValueError)     the call as given can never run; says what to change
├── Conflict                        the id belongs to another call with another body
├── Overloaded                      no room for the call now; says when to try again
├── NotReplicated                   the call is pushed, but too few replicas have it
├── CallEnded                       a call reached a terminal state without a result; carries the record (models.py)
│   ├── CallCancelled
│   └── CallFailed                  .error_code out of the closed set `ErrorCode`
├── BadRecord                       what Redis holds of a call cannot be read
├── UnknownCall (KeyError)          no record: never submitted, or expired after the result TTL
│   └── CallLost                    it was submitted, and Redis has lost it
├── IllegalTransition               a state change that the life cycle does not allow
├── EngineIdTaken                   another live worker holds this engine id
├── EvictingRedis                   Redis is set to delete keys when its memory is full
├── EngineFailed                    an engine could not be started, or died
└── BrokerUnavailable               Redis could not be reached in the time given
    └── AccessDenied                Redis refuses this user: its password, or its rights
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RsmError(Exception):
    """Root of all errors raised on purpose."""


class InvalidRequest(RsmError, ValueError):
    """The call as given can never run."""


class Conflict(RsmError):
    """The id is already used by another call with another body."""


class Overloaded(RsmError):
    """There is no room for more calls now. What was refused has left no trace, so it may be submitted again as it is.

    Attributes:
        retry_after: seconds after which there will be room at the present rate; 0 = the call's deadline has passed.
        bound: what is full: "open_calls", "open_bytes", "session_calls" or "session_bytes".
        setting: the variable that sets it.
        accepted: handles of the calls of this `submit_many` that are in, in order (`CallHandle` or `AsyncCall`).
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
        advice = f"Try again in {retry_after:g} s" if retry_after else "Its deadline has passed"
        super().__init__(f"There is no room for the call ({self.setting} is reached). {advice}.")


class NotReplicated(RsmError):
    """Fewer replicas than `RSM_WAIT_REPLICAS` have confirmed the push in time, so a fail-over now might lose it.

    The calls are pushed, and run. Submitting them again with the same ids is safe, and waits for the replicas again.

    Attributes:
        call_ids: the calls in question.
        replicas: how many replicas have them.
        wanted: how many were asked for.
    """

    def __init__(self, call_ids: Sequence[str], replicas: int, wanted: int) -> None:
        self.call_ids = list(call_ids)
        self.replicas = replicas
        self.wanted = wanted
        shown = self.call_ids[0] if len(self.call_ids) == 1 else f"{self.call_ids[0]} and {len(self.call_ids) - 1} more"
        super().__init__(
            f"Call {shown}: pushed, but {replicas} of {wanted} replicas have it (RSM_WAIT_REPLICAS). "
            "Submit again with the same id to wait for them again."
        )


class UnknownCall(RsmError, KeyError):
    """There is no record with this id."""

    def __str__(self) -> str:
        return str(self.args[0])


class BadRecord(RsmError):
    """What Redis holds of a call cannot be read: somebody else than the parts has written there."""


class CallLost(UnknownCall):
    """A call that was accepted has no record any more, though nothing was heard of its end."""

    def __init__(self, call_id: str) -> None:
        super().__init__(
            f"Redis has no record of call {call_id} any more: it was lost by a fail-over to a replica that "
            "lacked it, or by a restart; or it ended unheard, and has expired. "
            "Submit it again, with the same id if you like."
        )


class IllegalTransition(RsmError):
    """The life cycle does not allow this state change."""


class EngineIdTaken(RsmError):
    """Another live worker holds this engine id."""


class EvictingRedis(RsmError):
    """Redis is set to delete keys when its memory is full: accepted calls would vanish."""


class EngineFailed(RsmError):
    """An engine could not be started, or died."""


class BrokerUnavailable(RsmError):
    """Redis could not be reached in the time given."""


class AccessDenied(BrokerUnavailable):
    """Redis refuses this user: its password, or its rights; the message says which."""
