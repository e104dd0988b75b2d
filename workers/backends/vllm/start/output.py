"""What vLLM's processes print while they start: passed on as it comes, and remembered for the cause of a failure.

vLLM's engine runs in a process of its own. When that cannot start, the exception here says "see root cause above": the
cause is in the output alone.
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
# A line on which an exception ends, behind whatever a logger has put before it: "… ValueError: what is wrong".
_ERROR = re.compile(r"(?:^|[\s\]])((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)): (.+)$")
# Of these the cause is another exception's, further up.
_FOLLOWS = ("Engine core initialization failed", "EngineCore initialization failed", "Worker failed", "WorkerProc init")


class Output:
    """A context in which this process and those it starts write to stdout and stderr through here.

    The processes keep writing here after the context has ended, until they end; this one writes as before.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._saved: list[tuple[int, int]] = []
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Output:
        for number in (1, 2):
            try:
                original = os.dup(number)
            except OSError:  # closed: there is nobody to write to
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
        """The last exception that was printed, as "ValueError: what is wrong"; "" if none was. For after the context.

        Args:
            wait_s: how long what is still on its way may take, where all who could write have ended.
        """
        for reader in self._readers:
            reader.join(wait_s)
        return root_cause(list(self._lines))

    def _pass_on(self, read: int, original: int) -> None:
        partial = ""
        while data := os.read(read, 1 << 16):
            with suppress(OSError):  # whoever read that is gone, which must not end the engine
                os.write(original, data)
            *lines, partial = (partial + data.decode("utf-8", "replace")).split("\n")
            self._lines.extend(lines)
        os.close(read)
        os.close(original)


def is_consequence(message: str) -> bool:
    """Whether an exception only says that another one, further up in the output, was the cause."""
    return any(words in message for words in _FOLLOWS)


def root_cause(lines: list[str]) -> str:
    """The last exception in some output that is not a consequence of another one."""
    for line in reversed(lines):
        found = _ERROR.search(line.rstrip())
        if found and not is_consequence(found[2]):
            return f"{found[1].rpartition('.')[2]}: {found[2]}"
    return ""


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed, or none
            continue
