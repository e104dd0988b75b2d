"""A producer with the synchronous client and one thread per lane."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from chaos.producers.calls import Act, Plan
from chaos.producers.lanes import Lane, run_lanes
from chaos.producers.process import Book
from rsm.broker import BrokerUnavailable, CallEnded, CallHandle, Client, Delta, Settings, UnknownCall

T = TypeVar("T")


def run(book: Book, settings: Settings) -> None:
    """Runs all lanes; returns when the book has no more work."""
    run_lanes(_Lane, book, settings)


class _Lane(Lane):
    def _together(self, plans: list[Plan]) -> None:
        handles = [(plan, handle) for plan in plans if (handle := self._push(plan)) is not None]
        if plans and plans[0].act is Act.CANCEL_SESSION:
            self._cancel_session(plans)
        for plan, handle in handles:
            self._follow(plan, handle)

    def _push(self, plan: Plan) -> CallHandle | None:
        story = self._book.story(plan)
        if story.accepted:  # to a predecessor of this process
            try:
                return _retry(lambda: self._client.handle(plan.id))
            except UnknownCall:
                self._book.lost(plan)
                return None
        if plan.deadline_s and not story.deadline_ms:
            self._book.deadline(plan, _retry(lambda: self._client.deadline_in(plan.deadline_s)))
        handle = self._submit(plan)
        self._book.accepted(plan)
        return self._submit(plan) if plan.act is Act.TWICE else handle

    def _submit(self, plan: Plan) -> CallHandle:
        return _retry(
            lambda: self._client.submit(
                plan.prompt,
                id=plan.id,
                session=plan.session,
                model=plan.model,
                stream=plan.stream,
                deadline_ms=self._book.story(plan).deadline_ms or None,
                max_tokens=plan.max_tokens,
                temperature=0,
            )
        )

    def _follow(self, plan: Plan, handle: CallHandle) -> None:
        if plan.stream:
            self._read(plan)
        elif plan.act is Act.CANCEL:
            time.sleep(plan.after / 10)
            self._cancel(plan)
        record = _retry(handle.wait)
        result = record.result
        self._book.end(
            plan, record.state, result.text if result else "", result.token_ids if result else [], record.error_code
        )

    def _read(self, plan: Plan) -> None:
        """Reads the stream and acts in the middle of it; a second client resumes where the first one left."""
        if self._chunks(plan, self._client) and plan.act is Act.AWAY:
            with Client(settings=self._client.settings) as other:
                self._chunks(plan, other)

    def _chunks(self, plan: Plan, client: Client) -> bool:
        """Reads chunks; returns whether the stream was left before its end."""
        while True:
            try:
                for delta in client.stream(plan.id, self._book.story(plan).last_eid):
                    self._note(plan, delta)
                    if plan.act is Act.CANCEL and delta.n >= plan.after and not self._book.story(plan).cancels:
                        self._cancel(plan)
                    if plan.act is Act.AWAY and client is self._client and delta.n == plan.after:
                        return True
                return False
            except CallEnded:
                return False
            except BrokerUnavailable:
                continue

    def _note(self, plan: Plan, delta: Delta) -> None:
        self._book.chunk(plan, delta.n, delta.event_id, delta.text, list(delta.token_ids))

    def _cancel(self, plan: Plan) -> None:
        self._book.cancel(plan)
        if _retry(lambda: self._client.cancel(plan.id)):
            self._book.cancelled(plan, _retry(lambda: self._client.deadline_in(0)))

    def _cancel_session(self, plans: list[Plan]) -> None:
        time.sleep(plans[0].after / 10)
        for plan in plans:
            self._book.cancel(plan)
        _retry(lambda: self._client.cancel_session(plans[0].session))
        now = _retry(lambda: self._client.deadline_in(0))
        for plan in plans:
            self._book.session_cancelled(plan, now)


def _retry(action: Callable[[], T]) -> T:
    """Repeats an action while the broker is unavailable."""
    while True:
        try:
            return action()
        except BrokerUnavailable:
            continue
