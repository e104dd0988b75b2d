"""Keeps a program running: starts it, restarts it when it dies, and stops it within a time limit."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from rsm.broker import child_process as child
from rsm.broker.protocol.ids import new_id
from rsm.workers.environment import BIRTH_VARIABLE

log = logging.getLogger("rsm.supervisor")

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
# A program that ran for this long counts as healthy; its next death starts from the shortest pause.
_HEALTHY_S = 60.0
_LEAVE_MARGIN_S = 20.0


class Supervised:
    """One supervised program.

    Args:
        give_up: exit statuses after which it is not restarted, besides 0.
        died: called, from the supervising thread, after each unexpected end with its birth and status.

    Attributes:
        birth: the id of the running process (RSM_BIRTH). Unlike a pid, it is never reused.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        give_up: Sequence[int] = (),
        output: int | None = None,
        grace_s: float = 30.0,
        died: Callable[[str, int], None] | None = None,
    ) -> None:
        self.name = name
        self._command = list(command)
        self._env = {**os.environ, **(env or {})}
        self._give_up = {0, *give_up}
        self._output = output
        self._grace_s = grace_s
        self._died = died
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._watch, name=f"rsm-watch-{name}", daemon=True)
        self.birth = ""
        self.restarts = 0
        self.status: int | None = None

    def start(self) -> None:
        self._spawn()
        self._thread.start()

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def running(self) -> bool:
        """Whether it runs or will be restarted."""
        return self._thread.is_alive()

    def request_stop(self) -> None:
        """Sends SIGTERM and prevents restarts. Does not wait."""
        with self._lock:
            self._stopping.set()
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()

    def stop(self) -> None:
        """Stops it: SIGTERM, then SIGKILL after the grace period and a margin for its own clean-up."""
        self.request_stop()
        if self._process is not None:
            self.status = child.stop(self._process, self._grace_s + _LEAVE_MARGIN_S)
        if self._thread.is_alive():
            self._thread.join()

    def kill(self) -> str:
        """Sends SIGKILL and prevents restarts; returns its birth."""
        with self._lock:
            self._stopping.set()
            assert self._process is not None, "not started"  # noqa: S101
            self._process.kill()
        self._process.wait()
        self._thread.join()
        return self.birth

    def wait(self) -> int:
        """Waits until it has ended and will not be restarted; returns its last exit status."""
        self._thread.join()
        return self.status or 0

    def _spawn(self) -> None:
        with self._lock:
            if not self._stopping.is_set():
                self.birth = new_id()
                self._process = child.spawn(self._command, self._env | {BIRTH_VARIABLE: self.birth}, self._output)

    def _watch(self) -> None:
        pause = _FIRST_PAUSE_S
        while self._process is not None:
            began, process, birth = time.monotonic(), self._process, self.birth
            self.status = process.wait()
            child.end_session(process)  # such as an engine that hangs and still has its GPU
            if self._stopping.is_set() or self.status in self._give_up:
                return
            if self._died is not None:
                self._died(birth, self.status)
            pause = _FIRST_PAUSE_S if time.monotonic() - began > _HEALTHY_S else pause
            log.warning("%s ended with status %d; restarting it in %.1f s", self.name, self.status, pause)
            if self._stopping.wait(pause):
                return
            pause = min(_LONGEST_PAUSE_S, pause * 2)
            self.restarts += 1
            self._spawn()
