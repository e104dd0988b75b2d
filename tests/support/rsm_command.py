"""The installed `rsm` command, run as users run it: in its own process."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from rsm.broker import Settings
from rsm.broker.connection.retry import OUTAGES
from rsm.broker.errors import RsmError
from rsm.broker.protocol.models import EngineState
from rsm.broker.views.monitor import Monitor
from tests.support.waiting import eventually

RSM = str(Path(sys.executable).parent / "rsm")


class Deployment:
    """One `rsm up` in its own process, with its own state folder.

    Args:
        name: part of the folder's name. It must be short: the path of a socket has 107 bytes at most.
        env: additional variables for `rsm up` and all commands.
    """

    def __init__(self, name: str, *options: str, **env: str) -> None:
        self.folder = Path(f"/tmp/rsm-{name}-{os.getpid()}")
        self.options = options
        self.env = clean_env() | {"RSM_DATA_DIR": str(self.folder)} | env
        self.settings = Settings(data_dir=self.folder, redis_url=None)
        self.log = self.folder.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.family: list[psutil.Process] = []

    def up(self, *engines: str) -> None:
        """Starts `rsm up` and waits until these engines are READY."""
        with self.log.open("ab") as output:
            command = [RSM, "up", "--backend", "sim", *self.options]
            self.process = subprocess.Popen(command, env=self.env, stdout=output, stderr=output)
        eventually(lambda: all(self.is_ready(e) for e in engines), 30, "engines READY")

    def is_ready(self, engine: str) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            return bool(Monitor(self.settings).engine(engine)["state"] == EngineState.READY)
        except (RsmError, *OUTAGES):
            return False

    def interrupt(self, number: int = signal.SIGINT) -> None:
        assert self.process is not None
        self.family = psutil.Process(self.process.pid).children(recursive=True)  # some may have been restarted
        self.process.send_signal(number)

    def gone(self, timeout_s: float = 30) -> int:
        """Waits for `rsm up` to end. Fails if one of its processes is left. Returns its exit status."""
        assert self.process is not None
        status = self.process.wait(timeout_s)
        _, alive = psutil.wait_procs(self.family, timeout=3)
        assert not alive, [(p.pid, p.cmdline()[:4]) for p in alive]
        return status

    def rsm(self, *args: str, status: int = 0, text: str | None = None) -> str:
        """Runs one command and returns its output. Fails on another exit status or on a traceback."""
        done = run(*args, env=self.env, text=text)
        assert done.returncode == status, (args, done.returncode, done.stdout, done.stderr)
        return done.stdout if status == 0 else done.stdout + done.stderr

    def json(self, *args: str, status: int = 0) -> Any:
        """Runs one command with --json. Fails if anything else is on its stdout."""
        done = run(*args, "--json", env=self.env)
        assert done.returncode == status, (args, done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout)

    def clean_up(self) -> None:
        """Ends `rsm up` and removes the folder."""
        if self.process is not None and self.process.poll() is None:
            self.interrupt(signal.SIGTERM)
            self.gone()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.unlink(missing_ok=True)


def on_a_terminal(
    command: Sequence[str], env: Mapping[str, str], columns: int = 80
) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a program in its own terminal. Also returns the terminal's other end, which the caller must close."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    plain = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    process = subprocess.Popen(
        list(command),
        env=plain,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    return process, ours


def typed(command: Sequence[str], env: Mapping[str, str], columns: int = 80) -> str:
    """What a program shows on a terminal of this width, without colours."""
    process, terminal = on_a_terminal(command, env, columns)
    shown = b""
    try:
        while chunk := os.read(terminal, 65536):
            shown += chunk
    except OSError:  # all processes have closed the other end
        pass
    finally:
        os.close(terminal)
    process.wait(30)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")


def clean_env() -> dict[str, str]:
    """The environment without the settings of the user who runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RSM_")}


def run(
    *args: str, env: dict[str, str] | None = None, text: str | None = None, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [RSM, *args],
        env=clean_env() if env is None else env,
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done
