"""The verdict: compares what producers know (the ledgers) with what Redis holds, per call and in total."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from chaos.kept import Kept, Snapshot
from chaos.ledger import Story
from chaos.producers.calls import SIM_MODEL, Plan
from chaos.producers.process import INBOX
from rsm.broker.protocol.models import ErrorCode, RequestState
from rsm.workers.backends.sim.text import Prompt, answer

# How long an engine may continue a call after its cancel was acknowledged, counting only the seconds without a fault of
# its worker or of Redis. The command must arrive (p99 is a few milliseconds), and chunks in flight must be written.
_STOPS_WITHIN_S = 2.0
# How long a worker may need to notice that a fault of its line or of Redis is over: its longest pause between two tries
# (broker/connection/factory.py).
_RETRIES_WITHIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise. `check` is the promise's name."""

    check: str
    call: str
    detail: str

    def __str__(self) -> str:
        return f"{self.check}: {self.call} {self.detail}".rstrip()


@dataclass(frozen=True, slots=True)
class Window:
    """A fault as it happened, in epoch seconds of this machine, which also runs Redis."""

    name: str
    target: str
    began: float
    healed: float


@dataclass(frozen=True, slots=True)
class Case:
    """One call as known to both sides.

    Attributes:
        expected: text and token ids of an undisturbed engine.
    """

    id: str
    story: Story
    kept: Kept
    expected: tuple[str, list[int]]
    windows: Sequence[Window]


Reference = Mapping[str, tuple[str, list[int]]]
_TERMINAL = {s.value for s in RequestState if s.terminal}


def judge(
    stories: Mapping[str, Story], found: Snapshot, windows: Sequence[Window], reference: Reference
) -> list[Violation]:
    """Returns every broken promise.

    Args:
        reference: the engines' answers, before any fault, to prompts whose answers cannot be computed.
    """
    broken = [v for call_id, story in stories.items() for v in _judge_call(call_id, story, found, windows, reference)]
    return broken + list(_totals(stories, found)) + list(_rest(found))


def _judge_call(
    call_id: str, story: Story, found: Snapshot, windows: Sequence[Window], reference: Reference
) -> Iterator[Violation]:
    kept = found.calls.get(call_id)
    if kept is None or story.lost:
        if story.accepted:
            yield Violation("lost", call_id, "was accepted but has no record")
        return
    if kept.state not in _TERMINAL:
        yield Violation("stuck", call_id, f"is still {kept.state}")
        return
    case = Case(call_id, story, kept, expected(story.plan, reference), windows)
    for check in _CHECKS:
        yield from (Violation(check.__name__.strip("_").replace("_", " "), call_id, d) for d in check(case))


def expected(plan: Plan, reference: Reference) -> tuple[str, list[int]]:
    """Returns the text and token ids of an undisturbed engine."""
    if plan.model != SIM_MODEL:
        return reference[plan.prompt]
    whole = answer(Prompt.of(plan.prompt).seed(), plan.max_tokens)
    return whole.text, whole.ids


# -- one call: each check yields its objections; its name is the name of the promise


def _one_end(c: Case) -> Iterator[str]:
    in_inboxes = c.kept.ends_in_inboxes
    if in_inboxes > 1 or (in_inboxes == 0 and c.kept.inbox == INBOX):
        yield f"has {in_inboxes} ends in inboxes"
    ends = sum(e.end for e in c.kept.log)
    if c.story.plan.stream and ends != 1:
        yield f"has {ends} ends in its log"
    if c.story.plan.stream and c.kept.log and not c.kept.log[-1].end:
        yield "has a log that continues after its end"


def _end_reported(c: Case) -> Iterator[str]:
    ends = c.story.ends
    if len(ends) != 1:
        yield f"reported {len(ends)} ends to its waiter"
    elif ends[0].state != c.kept.state:
        yield f"reported {ends[0].state} to its waiter, but its record says {c.kept.state}"
    elif ends[0].text != c.kept.text:
        yield "reported another text to its waiter than its record has"


def _no_token_lost_or_repeated(c: Case) -> Iterator[str]:
    if not c.story.plan.stream:
        return
    chunks = [e for e in c.kept.log if not e.end]
    yield from _gaps("log", [e.n for e in chunks])
    yield from _gaps("reader", [e.n for e in c.story.chunks])
    yield from _differs(c, "log", "".join(e.text for e in chunks), [i for e in chunks for i in e.token_ids])
    if c.story.ends:
        read = c.story.chunks
        yield from _differs(c, "reader", "".join(e.text for e in read), [i for e in read for i in e.token_ids])


def _right_text(c: Case) -> Iterator[str]:
    yield from _differs(c, "result", c.kept.text, c.kept.token_ids)


def _gaps(where: str, numbers: list[int]) -> Iterator[str]:
    if numbers != list(range(len(numbers))):
        yield f"has chunks {numbers} in its {where}"


def _differs(c: Case, where: str, text: str, ids: Sequence[int]) -> Iterator[str]:
    """Yields an objection unless a completed call has the whole answer, and any other call a prefix of it."""
    whole, whole_ids = c.expected
    if c.kept.state == RequestState.COMPLETED:
        if (text, list(ids)) != (whole, whole_ids):
            yield f"has a wrong text in its {where}: {len(ids)} tokens, expected {len(whole_ids)}"
    elif not whole.startswith(text) or list(ids) != whole_ids[: len(ids)]:
        yield f"has a text in its {where} that is not a prefix of the right one"


def _rightly_cancelled(c: Case) -> Iterator[str]:
    if c.kept.state == RequestState.CANCELLED and not c.story.cancels:
        yield "is CANCELLED although nobody cancelled it"


def _rightly_failed(c: Case) -> Iterator[str]:
    if c.kept.state != RequestState.FAILED:
        return
    if c.kept.error_code != ErrorCode.DEADLINE_EXCEEDED or not c.story.deadline_ms:
        yield f"failed with {c.kept.error_code}"
    elif c.kept.finished_ms < c.story.deadline_ms:
        yield f"failed {c.story.deadline_ms - c.kept.finished_ms} ms before its deadline"


def _cancel_holds(c: Case) -> Iterator[str]:
    if c.story.cancelled_ms and c.kept.state != RequestState.CANCELLED:
        yield f"is {c.kept.state} although its cancel was acknowledged"
    ended_after = 0 < c.story.session_cancelled_ms < c.kept.finished_ms
    if ended_after and c.kept.state == RequestState.COMPLETED:
        yield "is COMPLETED after a cancel of its session was acknowledged"


def _stops_when_cancelled(c: Case) -> Iterator[str]:
    acknowledged = c.story.cancelled_ms or c.story.session_cancelled_ms
    if not acknowledged or c.kept.state != RequestState.CANCELLED:
        return
    # Only chunks count. If no router has read a call yet, its end is written when one does, but nothing has run.
    late = max((e.at_ms for e in c.kept.log if not e.end), default=0)
    if late > acknowledged and (ran := _calm_s(c, acknowledged / 1000, late / 1000)) > _STOPS_WITHIN_S:
        yield f"continued for {ran:.1f} s after its cancel was acknowledged"


def _calm_s(c: Case, since: float, until: float) -> float:
    """Returns the seconds of this span without a fault of the call's worker or of Redis."""
    calm, at = 0.0, since
    for w in sorted(c.windows, key=lambda w: w.began):
        felt_until = w.healed + _RETRIES_WITHIN_S
        if w.target in ("redis", c.kept.engine) and felt_until > at and w.began < until:
            calm += max(0.0, w.began - at)
            at = max(at, felt_until)
    return calm + max(0.0, until - at)


_CHECKS: tuple[Callable[[Case], Iterator[str]], ...] = (
    _one_end,
    _end_reported,
    _no_token_lost_or_repeated,
    _right_text,
    _rightly_cancelled,
    _rightly_failed,
    _cancel_holds,
    _stops_when_cancelled,
)


# -- all calls together


def _totals(stories: Mapping[str, Story], found: Snapshot) -> Iterator[Violation]:
    ended = sum(found.totals.get(name, 0) for name in ("completed", "cancelled", "failed"))
    counted = {"submitted": found.totals.get("submitted", 0), "ended": ended}
    known = sum(1 for s in stories.values() if s.accepted)
    for name, count in counted.items():
        if count != known:
            yield Violation("totals", "", f"Redis counted {count} {name}, but the ledgers have {known} accepted calls")
    for state in _TERMINAL:
        by_record = sum(k.state == state for k in found.calls.values())
        if by_record != found.totals.get(state.lower(), 0):
            counted_by_redis = found.totals.get(state.lower(), 0)
            yield Violation("totals", "", f"Redis counted {counted_by_redis} {state}, but {by_record} records say so")


def _rest(found: Snapshot) -> Iterator[Violation]:
    yield from (Violation("at rest", "", what) for what in found.busy)
    yield from (Violation("no key leaks", "", name) for name in found.leaked)
