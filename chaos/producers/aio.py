"""A producer with the asyncio client and a task per lane; chunks arrive live, through the inbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from chaos.producers.calls import Act, Plan
from chaos.producers.process import LANES, PAUSE_S, Book
from rsm.broker import AsyncClient, BrokerUnavailable, CallEnded, Delta, Settings, UnknownCall
from rsm.broker.client.handles import AsyncCall

T = TypeVar("T")


def run(book: Book, settings: Settings) -> None:
    """Runs all lanes; returns when the book has no more work."""
    asyncio.run(_run(book, settings))


async def _run(book: Book, settings: Settings) -> None:
    async with AsyncClient(settings=settings) as client, asyncio.TaskGroup() as lanes:
        for number in range(LANES):
            lanes.create_task(_Lane(book, client, number).run())


class _Lane:
    def __init__(self, book: Book, client: AsyncClient, number: int) -> None:
        self._book = book
        self._number = number
        self._client = client

    async def run(self) -> None:
        while (plans := self._book.take(self._number)) is not None:
            await self._together(plans)
            await asyncio.sleep(PAUSE_S)

    async def _together(self, plans: list[Plan]) -> None:
        calls = [(plan, call) for plan in plans if (call := await self._push(plan)) is not None]
        if plans and plans[0].act is Act.CANCEL_SESSION:
            await self._cancel_session(plans)
        for plan, call in calls:
            await self._follow(plan, call)

    async def _push(self, plan: Plan) -> AsyncCall | None:
        story = self._book.story(plan)
        known = bool(story.accepted)
        if known:  # to a predecessor of this process; pushed again below, so that its events arrive here
            try:
                await _retry(lambda: self._client.record(plan.id))
            except UnknownCall:
                self._book.lost(plan)
                return None
        if plan.deadline_s and not story.deadline_ms:
            self._book.deadline(plan, await _retry(lambda: self._client.deadline_in(plan.deadline_s)))
        call = await self._submit(plan)
        if not known:
            self._book.accepted(plan)
        return await self._submit(plan) if plan.act is Act.TWICE else call

    async def _submit(self, plan: Plan) -> AsyncCall:
        return await _retry(
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

    async def _follow(self, plan: Plan, call: AsyncCall) -> None:
        if plan.stream:
            await self._read(plan, call)
        elif plan.act is Act.CANCEL:
            await asyncio.sleep(plan.after / 10)
            await self._cancel(plan)
        record = await _retry(call.wait)
        result = record.result
        self._book.end(
            plan, record.state, result.text if result else "", result.token_ids if result else [], record.error_code
        )

    async def _read(self, plan: Plan, call: AsyncCall) -> None:
        """Reads live from the inbox; a stream that was left, or started by a predecessor, resumes from the log."""
        left = bool(self._book.story(plan).chunks) or await self._chunks(plan, call.stream(), may_leave=True)
        if left:
            async with AsyncClient(settings=self._client.settings) as other:
                while await self._chunks(plan, other.stream(plan.id, self._book.story(plan).last_eid)):
                    pass

    async def _chunks(self, plan: Plan, stream: AsyncIterator[Delta], may_leave: bool = False) -> bool:
        """Reads chunks; returns whether the stream was left before its end."""
        closing: Any = stream
        try:
            async with aclosing(closing):
                async for delta in stream:
                    self._book.chunk(plan, delta.n, delta.event_id, delta.text, list(delta.token_ids))
                    if plan.act is Act.CANCEL and delta.n >= plan.after and not self._book.story(plan).cancels:
                        await self._cancel(plan)
                    if plan.act is Act.AWAY and may_leave and delta.n == plan.after:
                        return True
        except CallEnded:
            return False
        except BrokerUnavailable:
            return True
        return False

    async def _cancel(self, plan: Plan) -> None:
        self._book.cancel(plan)
        if await _retry(lambda: self._client.cancel(plan.id)):
            self._book.cancelled(plan, await _retry(lambda: self._client.deadline_in(0)))

    async def _cancel_session(self, plans: list[Plan]) -> None:
        await asyncio.sleep(plans[0].after / 10)
        for plan in plans:
            self._book.cancel(plan)
        await _retry(lambda: self._client.cancel_session(plans[0].session))
        now = await _retry(lambda: self._client.deadline_in(0))
        for plan in plans:
            self._book.session_cancelled(plan, now)


async def _retry(action: Callable[[], Awaitable[T]]) -> T:
    """Repeats an action while the broker is unavailable."""
    while True:
        try:
            return await action()
        except BrokerUnavailable:
            continue
