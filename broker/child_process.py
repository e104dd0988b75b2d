"""Child processes that never outlive their parent, however it dies.

The kernel sends SIGTERM to a child when the thread that started it ends (prctl PR_SET_PDEATHSIG). So one thread that
lives as long as the process starts all children. The signal survives exec, so any program can be a child.
On systems other than Linux, a child gets SIGTERM when its parent stops in order, but not when its parent is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import IO

_WRAPPER = """
import ctypes, os, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != parent:
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""

_Request = tuple[list[str], dict[str, str], "int | IO[bytes] | None", "Path | None", "Future[subprocess.Popen[bytes]]"]
_requests: SimpleQueue[_Request] = SimpleQueue()
_lock = threading.Lock()
_starter: threading.Thread | None = None


def spawn(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    output: int | IO[bytes] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a program in its own session, so that Ctrl-C in the terminal reaches only the parent.

    Args:
        command: program and arguments.
        env: the child's whole environment. Default: this process's.
        output: where stdout and stderr go. Default: where this process's go.

    Raises:
        OSError: the interpreter that starts the program could not be run.
    """
    done: Future[subprocess.Popen[bytes]] = Future()
    _ensure_starter()
    _requests.put((list(command), dict(os.environ if env is None else env), output, cwd, done))
    return done.result()


def stop(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """Stops a child with SIGTERM, and its whole session with SIGKILL after `grace_s`. Returns the exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            return process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
    end_session(process)
    return process.wait()


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kills everything that a child has started with SIGKILL, even if the child itself has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _ensure_starter() -> None:
    global _starter
    with _lock:
        if _starter is None or not _starter.is_alive():
            _starter = threading.Thread(target=_start_children, name="rsm-children", daemon=True)
            _starter.start()


def _start_children() -> None:
    while True:
        command, env, output, cwd, done = _requests.get()
        wrapped = [sys.executable, "-I", "-S", "-c", _WRAPPER, str(os.getpid()), *command]
        try:
            done.set_result(
                subprocess.Popen(
                    wrapped,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=cwd,
                    start_new_session=True,
                )
            )
        except BaseException as e:
            done.set_exception(e)
