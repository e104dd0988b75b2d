"""Runs blocking actions outside the event loop, in daemon threads.

The threads of `asyncio.to_thread` are joined at exit: one that waits for a hanging Redis would keep the process alive.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from rsm.broker.connection.retry import persist

T = TypeVar("T")


async def in_thread(action: Callable[[], T]) -> T:
    """Runs `action` in a new thread and returns its result. If the caller is cancelled, the thread keeps running."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = action()
        except BaseException as e:
            error = e
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="rsm-blocking", daemon=True).start()
    return await done


async def until_answered(action: Callable[[], T], denial_is_final: bool = False) -> T:
    """Repeats `action` until Redis answers or the caller is cancelled; returns the answer.

    Raises:
        AccessDenied: `denial_is_final`, and Redis refuses this user.
    """
    stopped, answer = threading.Event(), list[T]()
    try:
        repeat = partial(persist, denial_is_final=denial_is_final)
        await in_thread(lambda: repeat(lambda: answer.append(action()), "worker", stopped.is_set))
    finally:
        stopped.set()
    return answer[0]
