"""Streams under way, shown as they come: which engine runs them, how far they are, and what becomes of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rsm.broker import CallHandle, Delta, RequestState
from rsm.broker.errors import RsmError
from rsm.broker.views.monitor import Monitor
from rsm.cli.output import cell

_LOOK_S = 0.2
_REFRESH_PER_S = 8
_BAR = 40  # columns
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "red")


class LiveStreams:
    """A context in which streams are shown live on a terminal; elsewhere it only keeps count.

    Args:
        tokens: how many each call will have.
        engines: in the order in which they are shown.
    """

    def __init__(
        self, out: Console, monitor: Monitor, handles: Sequence[CallHandle], tokens: int, engines: Sequence[str]
    ) -> None:
        self._monitor = monitor
        self._handles = list(handles)
        self._tokens = tokens
        self._colours = dict(zip(engines, _COLOURS, strict=False))
        self._got = {h.id: 0 for h in handles}
        self._ran_on: dict[str, list[str]] = {h.id: [] for h in handles}  # engines, in order
        self._states = dict.fromkeys(engines, "READY")
        self._note = ""
        self._over = threading.Event()
        self._looker = threading.Thread(target=self._look_again, name="rsm-demo-look", daemon=True)
        self._live: Any = (
            Live(get_renderable=self.picture, console=out, refresh_per_second=_REFRESH_PER_S)
            if out.is_terminal
            else nullcontext()
        )

    def __enter__(self) -> LiveStreams:
        self._looker.start()
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._looker.join()
        self._live.__exit__(kind, error, tb)

    def read(self, handle: CallHandle) -> list[Delta]:
        """Reads a stream to its end, and counts as it comes."""
        deltas = []
        for delta in handle.stream():
            deltas.append(delta)
            self._got[handle.id] += len(delta.token_ids)
        return deltas

    def seen(self, request_id: str, engine_id: str) -> None:
        """A call runs on an engine."""
        ran_on = self._ran_on.get(request_id)
        if ran_on is not None and engine_id and ran_on[-1:] != [engine_id]:
            ran_on.append(engine_id)

    def note(self, sentence: str) -> None:
        """A line below the streams."""
        self._note = sentence

    def picture(self) -> RenderableType:
        """The engines, and a bar for each stream, in the colour of the engine that runs it."""
        engines = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("ENGINE", "STATE", "STREAMS", "TOKENS"):
            engines.add_column(column, justify="right" if column in ("STREAMS", "TOKENS") else "left")
        for engine, state in self._states.items():
            mine = [h for h in self._handles if self._engine_of(h) == engine]
            running = sum(self._got[h.id] < self._tokens for h in mine)
            tokens = sum(self._got[h.id] for h in mine)
            engines.add_row(Text(engine, style=self._colours.get(engine, "")), cell(state), str(running), f"{tokens:,}")
        return Group(engines, *(self._bar(i, h) for i, h in enumerate(self._handles, 1)), Text(self._note, "bold"))

    def _bar(self, number: int, handle: CallHandle) -> Text:
        got, ran_on = self._got[handle.id], self._ran_on[handle.id]
        filled = min(_BAR, got * _BAR // max(self._tokens, 1))
        line = Text(f"{number:>4} ")
        line.append("█" * filled, style=self._colours.get(ran_on[-1] if ran_on else "", ""))
        line.append("·" * (_BAR - filled), style="dim")
        return line.append(f" {got:>5} tokens  {' → '.join(ran_on)}")

    def _engine_of(self, handle: CallHandle) -> str:
        ran_on = self._ran_on[handle.id]
        return ran_on[-1] if ran_on else ""

    def _look_again(self) -> None:
        while not self._over.wait(_LOOK_S):
            try:
                self._look()
            except RsmError:
                continue  # the next look shows it

    def _look(self) -> None:
        for engine in self._monitor.engines():
            if engine["engine_id"] in self._states:
                self._states[engine["engine_id"]] = str(engine["state"])
        for call in self._monitor.active_calls():
            if call.record.state is RequestState.RUNNING:
                self.seen(call.request_id, call.engine_id)
