"""A live view of running streams: the engine of each, its progress, and its moves to other engines."""

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

_POLL_S = 0.2
_REFRESH_PER_S = 8
_BAR = 40  # columns
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "red")


class LiveStreams:
    """A context that shows streams live on a terminal. Without a terminal, it only counts.

    Args:
        tokens: how many tokens each call will have.
        engines: ids of the engines, in the order to show them.
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
        self._poller = threading.Thread(target=self._poll, name="rsm-demo-poll", daemon=True)
        self._live: Any = (
            Live(get_renderable=self.picture, console=out, refresh_per_second=_REFRESH_PER_S)
            if out.is_terminal
            else nullcontext()
        )

    def __enter__(self) -> LiveStreams:
        self._poller.start()
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._poller.join()
        self._live.__exit__(kind, error, tb)

    def read(self, handle: CallHandle) -> list[Delta]:
        """Reads a stream to its end and counts its tokens."""
        deltas = []
        for delta in handle.stream():
            deltas.append(delta)
            self._got[handle.id] += len(delta.token_ids)
        return deltas

    def seen(self, request_id: str, engine_id: str) -> None:
        """Notes that a call runs on an engine."""
        ran_on = self._ran_on.get(request_id)
        if ran_on is not None and engine_id and ran_on[-1:] != [engine_id]:
            ran_on.append(engine_id)

    def note(self, line: str) -> None:
        """Shows a line below the streams."""
        self._note = line

    def picture(self) -> RenderableType:
        """The engines, and a bar for each stream in the colour of its engine."""
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

    def _poll(self) -> None:
        while not self._over.wait(_POLL_S):
            try:
                self._update()
            except RsmError:
                continue  # the next one may work

    def _update(self) -> None:
        for engine in self._monitor.engines():
            if engine["engine_id"] in self._states:
                self._states[engine["engine_id"]] = str(engine["state"])
        for call in self._monitor.active_calls():
            if call.record.state is RequestState.RUNNING:
                self.seen(call.request_id, call.engine_id)
