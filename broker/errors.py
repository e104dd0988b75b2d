"""Every error that rsm-engine raises on purpose.

RsmError
├── InvalidRequest (ValueError)     the call as given can never run; says what to change
├── Conflict                        the id belongs to another call with another body
├── CallEnded                       a call reached a terminal state without a result; carries the record
│   ├── CallCancelled
│   └── CallFailed                  .error_code out of the closed set `ErrorCode`
├── UnknownCall (KeyError)          no record: never submitted, or expired after the result TTL
├── IllegalTransition               a state change that the life cycle does not allow
├── EngineIdTaken                   another live worker holds this engine id
├── EngineFailed                    an engine could not be started, or died
└── BrokerUnavailable               Redis could not be reached in the time given
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.models import CallRecord


class RsmError(Exception):
    """Root of all errors raised on purpose."""


class InvalidRequest(RsmError, ValueError):
    """The call as given can never run."""


class Conflict(RsmError):
    """The id is already used by another call with another body."""


class CallEnded(RsmError):
    """A call reached a terminal state without a result.

    Attributes:
        record: the call's record as it stood at its end.
        partial_text: what the engine had produced until then, "" if nothing.
    """

    def __init__(self, record: CallRecord) -> None:
        self.record = record
        self.partial_text = record.result.text if record.result else ""
        super().__init__(record.error or f"Call {record.id} ended as {record.state}.")


class CallCancelled(CallEnded):
    """The call, or its whole session, was cancelled."""


class CallFailed(CallEnded):
    """The call failed; `error_code` says how, the message what to do about it."""

    @property
    def error_code(self) -> str:
        return self.record.error_code


class UnknownCall(RsmError, KeyError):
    """There is no record with this id."""

    def __str__(self) -> str:
        return str(self.args[0])


class IllegalTransition(RsmError):
    """The life cycle does not allow this state change."""


class EngineIdTaken(RsmError):
    """Another live worker holds this engine id."""


class EngineFailed(RsmError):
    """An engine could not be started, or died."""


class BrokerUnavailable(RsmError):
    """Redis could not be reached in the time given."""
