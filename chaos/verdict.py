"""The verdict: what producers know (the ledger) held against what Redis holds, call by call and in total."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from chaos.kept import Kept, Snapshot
from chaos.ledger import Story
from chaos.producers.calls import SIM_MODEL, Plan
from chaos.producers.process import INBOX
from rsm.broker.protocol.models import ErrorCode, RequestState
from rsm.workers.backends.sim.text import Prompt, answer

# How long an engine may go on with a call after its cancel was acknowledged, in seconds without a fault of its
# worker or of Redis: the order has to get there (p99 is some milliseconds), and chunks on their way have to land.
_STOPS_WITHIN_S = 2.0
# How long a worker may need to find out that a fault of its line or of Redis is over: its longest pause between two
# tries (broker/connection/factory.py).
_RETRIES_WITHIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept. `check` is the promise's name."""

    check: str
    call: str
    detail: str

    def __str__(self) -> str:
        return f"{self.check}: {self.call} {self.detail}".rstrip()


@dataclass(frozen=True, slots=True)
class Window:
    """A fault as it happened. Epoch seconds of this machine, which is also Redis's."""

    name: str
    target: str
    began: float
    healed: float


@dataclass(frozen=True, slots=True)
class Case:
    """One call as both sides know it.

    Attributes:
        said: text and token ids of an undisturbed engine.
    """

    id: str
    story: Story
    kept: Kept
    said: tuple[str, list[int]]
    windows: Sequence[Window]


Reference = Mapping[str, tuple[str, list[int]]]
_TERMINAL = {s.value for s in RequestState if s.terminal}


def judge(
    stories: Mapping[str, Story], found: Snapshot, windows: Sequence[Window], reference: Reference
) -> list[Violation]:
    """Every broken promise.

    Args:
        reference: what engines said, before the chaos, to prompts whose answers cannot be computed.
    """
    broken = [v for call_id, story in stories.items() for v in _judge_call(call_id, story, found, windows, reference)]
    return broken + list(_totals(stories, found)) + list(_rest(found))


def _judge_call(
    call_id: str, story: Story, found: Snapshot, windows: Sequence[Window], reference: Reference
) -> Iterator[Violation]:
    kept = found.calls.get(call_id)
    if kept is None or story.lost:
        if story.accepted:
            yield Violation("lost", call_id, "was accepted and has no record")
        return
    if kept.state not in _TERMINAL:
        yield Violation("stuck", call_id, f"is still {kept.state}")
        return
    case = Case(call_id, story, kept, said(story.plan, reference), windows)
    for check in _CHECKS:
        yield from (Violation(check.__name__.strip("_").replace("_", " "), call_id, d) for d in check(case))


def said(plan: Plan, reference: Reference) -> tuple[str, list[int]]:
    """Text and token ids that an undisturbed engine gives."""
    if plan.model != SIM_MODEL:
        return reference[plan.prompt]
    whole = answer(Prompt.of(plan.prompt).seed(), plan.max_tokens)
    return whole.text, whole.ids


# -- one call: each check yields what it objects to; its name is the promise's


def _one_end(c: Case) -> Iterator[str]:
    if c.kept.told > 1 or (c.kept.told == 0 and c.kept.inbox == INBOX):
        yield f"has {c.kept.told} ends in inboxes"
    ends = sum(e.end for e in c.kept.log)
    if c.story.plan.stream and ends != 1:
        yield f"has {ends} ends in its log"
    if c.story.plan.stream and c.kept.log and not c.kept.log[-1].end:
        yield "has a log that goes on behind its end"


def _waiter_told(c: Case) -> Iterator[str]:
    told = c.story.ends
    if len(told) != 1:
        yield f"was told {len(told)} ends"
    elif (told[0].state, told[0].text) != (c.kept.state, c.kept.text):
        yield f"was told {told[0].state}, its record says {c.kept.state}, or another text"


def _no_token_lost_or_repeated(c: Case) -> Iterator[str]:
    if not c.story.plan.stream:
        return
    chunks = [e for e in c.kept.log if not e.end]
    yield from _gaps("log", [p.n for p in chunks])
    yield from _gaps("reader", [p.n for p in c.story.chunks])
    yield from _differs(c, "log", "".join(p.text for p in chunks), [i for p in chunks for i in p.token_ids])
    if c.story.ends:
        read = c.story.chunks
        yield from _differs(c, "reader", "".join(p.text for p in read), [i for p in read for i in p.token_ids])


def _right_text(c: Case) -> Iterator[str]:
    yield from _differs(c, "result", c.kept.text, c.kept.token_ids)


def _gaps(where: str, numbers: list[int]) -> Iterator[str]:
    if numbers != list(range(len(numbers))):
        yield f"has chunks {numbers} in its {where}"


def _differs(c: Case, where: str, text: str, ids: Sequence[int]) -> Iterator[str]:
    """A completed call has the whole answer; any other has a beginning of it."""
    whole, whole_ids = c.said
    if c.kept.state == RequestState.COMPLETED:
        if (text, list(ids)) != (whole, whole_ids):
            yield f"has another text in its {where}: {len(ids)} tokens of {len(whole_ids)}"
    elif not whole.startswith(text) or list(ids) != whole_ids[: len(ids)]:
        yield f"has a text in its {where} that is no beginning of the right one"


def _rightly_cancelled(c: Case) -> Iterator[str]:
    if c.kept.state == RequestState.CANCELLED and not c.story.cancels:
        yield "is CANCELLED though nobody asked for it"


def _rightly_failed(c: Case) -> Iterator[str]:
    if c.kept.state != RequestState.FAILED:
        return
    if c.kept.error_code != ErrorCode.DEADLINE_EXCEEDED or not c.story.deadline_ms:
        yield f"FAILED with {c.kept.error_code}"
    elif c.kept.finished_ms < c.story.deadline_ms:
        yield f"failed {c.story.deadline_ms - c.kept.finished_ms} ms before its deadline"


def _cancel_holds(c: Case) -> Iterator[str]:
    if c.story.cancelled_ms and c.kept.state != RequestState.CANCELLED:
        yield f"is {c.kept.state} though its cancel was acknowledged"
    ended_after = 0 < c.story.session_cancelled_ms < c.kept.finished_ms
    if ended_after and c.kept.state == RequestState.COMPLETED:
        yield "is COMPLETED after a cancel of its session was acknowledged"


def _stops_when_cancelled(c: Case) -> Iterator[str]:
    acknowledged = c.story.cancelled_ms or c.story.session_cancelled_ms
    if not acknowledged or c.kept.state != RequestState.CANCELLED:
        return
    # Chunks alone: the end of a call that no router had read yet is written when one reads it, and nothing has run.
    late = max((e.at_ms for e in c.kept.log if not e.end), default=0)
    if late > acknowledged and (ran := _calm_s(c, acknowledged / 1000, late / 1000)) > _STOPS_WITHIN_S:
        yield f"ran on for {ran:.1f} s after its cancel was acknowledged"


def _calm_s(c: Case, since: float, until: float) -> float:
    """Seconds of this span in which neither the call's worker nor Redis suffered a fault."""
    calm, at = 0.0, since
    for w in sorted(c.windows, key=lambda w: w.began):
        felt_until = w.healed + _RETRIES_WITHIN_S
        if w.target in ("redis", c.kept.engine) and felt_until > at and w.began < until:
            calm += max(0.0, w.began - at)
            at = max(at, felt_until)
    return calm + max(0.0, until - at)


_CHECKS: tuple[Callable[[Case], Iterator[str]], ...] = (
    _one_end,
    _waiter_told,
    _no_token_lost_or_repeated,
    _right_text,
    _rightly_cancelled,
    _rightly_failed,
    _cancel_holds,
    _stops_when_cancelled,
)


# -- the whole


def _totals(stories: Mapping[str, Story], found: Snapshot) -> Iterator[Violation]:
    ended = sum(found.totals.get(name, 0) for name in ("completed", "cancelled", "failed"))
    counted = {"submitted": found.totals.get("submitted", 0), "ended": ended}
    known = sum(1 for s in stories.values() if s.accepted)
    for name, count in counted.items():
        if count != known:
            yield Violation("totals", "", f"{count} {name} by Redis's count, {known} accepted by the ledger's")
    for state in _TERMINAL:
        by_record = sum(k.state == state for k in found.calls.values())
        if by_record != found.totals.get(state.lower(), 0):
            yield Violation("totals", "", f"{found.totals.get(state.lower(), 0)} {state} counted, {by_record} records")


def _rest(found: Snapshot) -> Iterator[Violation]:
    yield from (Violation("at rest", "", what) for what in found.busy)
    yield from (Violation("no key leaks", "", name) for name in found.leaked)
