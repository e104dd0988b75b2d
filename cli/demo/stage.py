"""What the acts of `rsm demo` need: a private fleet, a ledger of every call sent, and a list of promises."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rsm.broker import CallHandle, CallRecord, Client, Settings
from rsm.broker.client.request import Prompt
from rsm.broker.errors import RsmError
from rsm.broker.views.monitor import Monitor
from rsm.engine.fleet import Fleet
from rsm.workers.backends.vllm.start.gpus import on_gpu
from rsm.workers.config import EngineConfig

# Far beyond what anything takes here; a demo that hangs is a demo that failed.
PATIENCE_S = 120.0
_START_S = 300.0
_POLL_S = 0.02


class Stage:
    """Two engines, a router and a Redis of their own; nothing of the user's is touched.

    Args:
        out: where the story is told. The processes' logs go to a file.
    """

    def __init__(self, configs: Sequence[EngineConfig], out: Console) -> None:
        self.out = out
        self.configs = list(configs)
        self.log_file = Path(tempfile.mkdtemp(prefix="rsm-demo-")) / "processes.log"
        self.broken: list[str] = []
        self.ledger: list[str] = []
        self._log = self.log_file.open("ab")
        self._handler = logging.StreamHandler(self.log_file.open("a"))
        self._fleet = Fleet(_own_settings(), output=self._log.fileno())
        self.monitor: Monitor
        self.client: Client

    @property
    def backend(self) -> str:
        return self.configs[0].backend

    @property
    def exact(self) -> bool:
        """Whether a call's text does not depend on which calls run beside it."""
        return self.backend == "sim" or not on_gpu()

    @property
    def engine_ids(self) -> list[str]:
        return [config.engine_id for config in self.configs]

    def __enter__(self) -> Stage:
        logging.getLogger("rsm").addHandler(self._handler)
        began = time.monotonic()
        with self._waiting() as waiting:
            self._fleet.start(
                self.configs, _START_S, lambda what: waiting(f"{what} [{time.monotonic() - began:.0f} s]")
            )
        self.monitor = Monitor(self._fleet.settings)
        self.client = Client(settings=self._fleet.settings)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.client.close()
        self._fleet.stop()
        logging.getLogger("rsm").removeHandler(self._handler)
        self._handler.stream.close()
        self._log.close()

    @contextmanager
    def _waiting(self) -> Iterator[Callable[[str], None]]:
        """What is being done, as it is: a spinner on a terminal, else a line each time that it changes."""
        if not self.out.is_terminal:
            yield lambda what: self.out.print(f"  {what}", soft_wrap=True)
            return
        with self.out.status("starting") as status:
            yield status.update

    # -- calls

    def submit(self, prompt: Prompt, session: str, max_tokens: int, *, stream: bool = False) -> CallHandle:
        """Sends one greedy call that runs to `max_tokens`, and writes it down."""
        handle = self.client.submit(
            prompt, session=session, stream=stream, max_tokens=max_tokens, temperature=0, ignore_eos=True
        )
        self.ledger.append(handle.id)
        return handle

    def chunks(self, handle: CallHandle) -> int:
        """How many chunks of a streamed call are out."""
        return int(self.client.redis.xlen(self.client.keys.events(handle.id)))

    def records(self, handles: Sequence[CallHandle]) -> list[CallRecord]:
        """How each call ended, waiting for those that have not."""
        return [handle.wait(PATIENCE_S) for handle in handles]

    def states_of_ledger(self) -> Counter[str]:
        """The demo's own book: what became of every id it sent."""
        return Counter(self.client.record(call_id).state.value for call_id in self.ledger)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for something to come true.

        Raises:
            RsmError: it did not.
        """
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > end:
                raise RsmError(f"Waited {PATIENCE_S:g} s and did not see this: {what}.")
            time.sleep(_POLL_S)

    # -- telling

    def act(self, title: str, look_at: str) -> None:
        self.out.print()
        self.out.print(Rule(title, align="left", style="bold"))
        self.out.print(Text(look_at, style="dim"), soft_wrap=True)

    def show(self, made: Table) -> None:
        self.out.print(made)

    def promise(self, kept: bool, sentence: str) -> None:
        """States a promise and whether it was kept; a broken one makes the demo fail."""
        if not kept:
            self.broken.append(sentence)
        self.out.print(Text(f"{'✓' if kept else '✗ NOT'} {sentence}", style="green" if kept else "bold red"))


def _with_time(began: float, waiting: Callable[[str], None], what: str) -> None:
    waiting(f"[{time.monotonic() - began:3.0f} s] {what}")


def _own_settings() -> Settings:
    """Defaults, whatever the environment says: the demo must not meet a Redis in use, nor depend on its tuning."""
    values: dict[str, Any] = {"policy": "autellix", "drain_grace_s": 5.0}
    return Settings.model_construct().model_copy(update=values)
