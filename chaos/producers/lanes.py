"""A producer's lanes as threads; each kind of producer defines what a lane does with its calls."""

from __future__ import annotations

import threading
import time

from chaos.producers.calls import Plan
from chaos.producers.process import LANES, PAUSE_S, Book
from rsm.broker import Client, Settings

_LOOK_S = 0.1


class Lane(threading.Thread):
    """Processes one call, or one session, after the other. `error`: the exception that ended it early, if any."""

    def __init__(self, book: Book, client: Client, number: int) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self._book = book
        self._number = number
        self._client = client

    def run(self) -> None:
        try:
            while (plans := self._book.take(self._number)) is not None:
                self._together(plans)
                time.sleep(PAUSE_S)
        except BaseException as e:
            self.error = e
            self._book.stopping.set()

    def _together(self, plans: list[Plan]) -> None:
        """Pushes these calls, or takes over a predecessor's, and follows them to their ends."""
        raise NotImplementedError


def run_lanes(lane_of: type[Lane], book: Book, settings: Settings) -> None:
    """Runs all lanes; returns when the book has no more work, or raises the error of a lane."""
    with Client(settings=settings) as client:
        lanes = [lane_of(book, client, number) for number in range(LANES)]
        for lane in lanes:
            lane.start()
        while any(lane.is_alive() for lane in lanes):  # join() would delay the handling of signals
            time.sleep(_LOOK_S)
    for lane in lanes:
        if lane.error is not None:
            raise lane.error
