"""What may block for long, beside the event loop, in threads that a process which ends does not wait for.

The threads of `asyncio.to_thread` are joined at exit: one that waits for a Redis that hangs would keep the process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from rsm.broker.connection.retry import persist

T = TypeVar("T")


async def aside(action: Callable[[], T]) -> T:
    """The result of `action`, run in a thread of its own. A caller that is cancelled leaves the thread behind."""
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

    threading.Thread(target=run, name="rsm-aside", daemon=True).start()
    return await done


async def ask(action: Callable[[], T], denial_is_final: bool = False) -> T:
    """What Redis answers to `action`, which is repeated until it does, or until the caller waits no more.

    Raises:
        AccessDenied: `denial_is_final`, and Redis refuses this user.
    """
    enough, done = threading.Event(), list[T]()
    try:
        asking = partial(persist, denial_is_final=denial_is_final)
        await aside(lambda: asking(lambda: done.append(action()), "worker", enough.is_set))
    finally:
        enough.set()
    return done[0]
