"""Captures the output of vLLM's processes while they start, to find the cause of a failure. The output is passed on.

vLLM's engine runs in a process of its own. If it cannot start, the exception here says "see root cause above", and the
cause is only in the output.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections import deque
from contextlib import suppress
from types import TracebackType

_KEPT = 400  # lines
# The last line of an exception, after any prefix of a logger: "… ValueError: what is wrong".
_ERROR = re.compile(r"(?:^|[\s\]])((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)): (.+)$")
# The cause of these is another exception, further up.
_CONSEQUENCES = (
    "Engine core initialization failed", "EngineCore initialization failed", "Worker failed", "WorkerProc init",
)  # fmt: skip


class Output:
    """A context that captures stdout and stderr of this process and of the processes that it starts.

    After the context, those processes are captured until they end; this process is not.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._saved: list[tuple[int, int]] = []
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Output:
        for number in (1, 2):
            try:
                original = os.dup(number)
            except OSError:  # it is closed
                continue
            read, write = os.pipe()
            _flush()
            os.dup2(write, number)
            os.close(write)
            self._saved.append((number, original))
            reader = threading.Thread(target=self._pass_on, args=(read, os.dup(original)), daemon=True)
            reader.start()
            self._readers.append(reader)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _flush()
        for number, original in self._saved:
            os.dup2(original, number)
            os.close(original)

    def cause(self, wait_s: float = 2.0) -> str:
        """The last printed exception, as "ValueError: what is wrong"; "" if there is none. Call it after the context.

        Args:
            wait_s: how long to wait for output in flight, once all writing processes have ended.
        """
        for reader in self._readers:
            reader.join(wait_s)
        return root_cause(list(self._lines))

    def _pass_on(self, read: int, original: int) -> None:
        partial = ""
        while data := os.read(read, 1 << 16):
            with suppress(OSError):  # a reader that is gone must not end the engine
                os.write(original, data)
            *lines, partial = (partial + data.decode("utf-8", "replace")).split("\n")
            self._lines.extend(lines)
        os.close(read)
        os.close(original)


def is_consequence(message: str) -> bool:
    """Whether an exception only refers to another one, further up in the output."""
    return any(words in message for words in _CONSEQUENCES)


def root_cause(lines: list[str]) -> str:
    """The last exception in the output that is not a consequence of another one."""
    for line in reversed(lines):
        found = _ERROR.search(line.rstrip())
        if found and not is_consequence(found[2]):
            return f"{found[1].rpartition('.')[2]}: {found[2]}"
    return ""


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # it is closed or missing
            continue
