"""`rsm node` in its own process, and the engines that it starts."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil

from rsm.broker import Settings
from rsm.workers.supervision.node import listening
from tests.support.rsm_command import RSM, clean_env
from tests.support.sim_processes import processes_of
from tests.support.waiting import eventually

NAME = "host"
START_S = 40
# How long a process may take to do something on a busy machine.
_BUSY_S = 60.0


class Node:
    """A node's process, which can be restarted."""

    def __init__(self, settings: Settings, log: Path, name: str = NAME) -> None:
        self._settings = settings
        self._log = log
        self._name = name
        self.start()

    def start(self) -> None:
        env = clean_env() | self._settings.environment()
        with self._log.open("ab") as output:
            self.process = subprocess.Popen([RSM, "node", "--name", self._name], env=env, stdout=output, stderr=output)

    def up(self) -> Node:
        """Waits until it listens."""
        await_listening(self._settings, self._name)
        return self

    def restart(self, number: int) -> int:
        """Ends the process with a signal, starts a new one and waits for it. Returns the old one's exit status."""
        starts = self.log().count("Listening on")
        self.process.send_signal(number)
        status = self.process.wait(30)
        self.start()
        eventually(lambda: self.log().count("Listening on") > starts, _BUSY_S)
        return status

    def job_process(self) -> psutil.Process:
        """The process of the job that the node runs."""
        (found,) = psutil.Process(self.process.pid).children()
        return found

    def end(self) -> None:
        """kill -9, also for a stopped process."""
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def log(self) -> str:
        return self._log.read_text()


def await_listening(settings: Settings, *names: str) -> None:
    """Waits until all these nodes listen."""
    eventually(lambda: set(names) <= set(listening(settings)), _BUSY_S, f"nodes {names} listen")


def workers_of(settings: Settings) -> list[psutil.Process]:
    """Workers and their supervisors."""
    return [p for p in processes_of(settings) if "rsm.workers" in _words(p)]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
