"""What the acts of `rsm demo` need: a private fleet, a ledger of every call sent, and the results of checks."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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

# Far beyond what anything takes here: a demo that hangs has failed.
TIMEOUT_S = 120.0
_START_S = 300.0
_POLL_S = 0.02


class Stage:
    """Two engines, a router and a Redis of their own. A context; nothing of the user's is touched.

    Args:
        out: where the demo prints.
        log_file: where the processes log.
    """

    def __init__(self, configs: Sequence[EngineConfig], out: Console, log_file: Path) -> None:
        self.out = out
        self.configs = list(configs)
        self.log_file = log_file
        self.failures: list[str] = []
        self.ledger: list[str] = []
        self.monitor: Monitor
        self.client: Client
        self._stack = ExitStack()

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
        with ExitStack() as stack:
            output = stack.enter_context(self.log_file.open("ab"))
            stack.enter_context(_logging_to(self.log_file))
            fleet = Fleet(_own_settings(), output=output.fileno())
            self._start(fleet)
            stack.callback(fleet.stop)
            self.monitor = Monitor(fleet.settings)
            self.client = stack.enter_context(Client(settings=fleet.settings))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _start(self, fleet: Fleet) -> None:
        began = time.monotonic()
        with self._progress() as report:
            fleet.start(self.configs, _START_S, lambda what: report(f"{what} [{time.monotonic() - began:.0f} s]"))

    @contextmanager
    def _progress(self) -> Iterator[Callable[[str], None]]:
        """A function that shows the current step: by a spinner on a terminal, else by a line for each step."""
        if not self.out.is_terminal:
            yield lambda what: self.out.print(f"  {what}", soft_wrap=True)
            return
        with self.out.status("starting") as status:
            yield status.update

    # -- calls

    def submit(self, prompt: Prompt, session: str, max_tokens: int, *, stream: bool = False) -> CallHandle:
        """Submits one greedy call that runs to `max_tokens`, and enters it in the ledger."""
        handle = self.client.submit(
            prompt, session=session, stream=stream, max_tokens=max_tokens, temperature=0, ignore_eos=True
        )
        self.ledger.append(handle.id)
        return handle

    def chunks(self, handle: CallHandle) -> int:
        """How many chunks a streamed call has published."""
        return int(self.client.redis.xlen(self.client.keys.events(handle.id)))

    def records(self, handles: Sequence[CallHandle]) -> list[CallRecord]:
        """Waits until all calls have ended, and returns their records."""
        return [handle.wait(TIMEOUT_S) for handle in handles]

    def states_of_ledger(self) -> Counter[str]:
        """The current states of all calls in the ledger."""
        return Counter(self.client.record(call_id).state.value for call_id in self.ledger)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits until a condition holds. Raises RsmError if it takes too long."""
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > end:
                raise RsmError(f"Waited {TIMEOUT_S:g} s in vain for this: {what}.")
            time.sleep(_POLL_S)

    # -- output

    def act(self, title: str, look_at: str) -> None:
        self.out.print()
        self.out.print(Rule(title, align="left", style="bold"))
        self.out.print(Text(look_at, style="dim"), soft_wrap=True)

    def show(self, made: Table) -> None:
        self.out.print(made)

    def check(self, passed: bool, statement: str) -> None:
        """Prints a statement and whether it is true. A false one makes the demo fail."""
        if not passed:
            self.failures.append(statement)
        mark, style = ("✓", "green") if passed else ("✗ FAILED:", "bold red")
        self.out.print(Text(f"{mark} {statement}", style=style), soft_wrap=True)


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Sends this process's own log lines to a file, too."""
    logger = logging.getLogger("rsm")
    with file.open("a", encoding="utf-8") as stream:
        handler = logging.StreamHandler(stream)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


def _own_settings() -> Settings:
    """Defaults, whatever the environment says: the demo must not use a Redis in production, nor depend on tuning."""
    values: dict[str, Any] = {"policy": "autellix", "drain_grace_s": 5.0}
    return Settings.model_construct().model_copy(update=values)
