"""Runs a process as in a container: only its image, a user without a name, no HOME, a read-only root.

As root on Linux, it uses a mount namespace, with a new root of this machine's programs and the image's folder. Where
mount namespaces are not allowed, the process at least has another user and no HOME.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

_OF_THE_SYSTEM = ("/bin", "/etc", "/lib", "/lib32", "/lib64", "/sbin", "/usr")
_TMPFS = "mount -t tmpfs -o mode={mode} rsm {at}"


@dataclass(frozen=True, slots=True)
class Container:
    """How to run a program with an image.

    Args:
        image: folders that are mounted read-only.
        user: id of the user and of the group.
        env: the whole environment.
        volumes: folders of this machine, by their paths in the container. Besides /tmp, only they are writable.
    """

    image: Sequence[Path]
    user: int
    env: Mapping[str, str]
    volumes: Mapping[str, Path]

    def command(self, *words: str) -> list[str]:
        """A command line for this machine that becomes that process, with the same pid.

        Skips the test if that is impossible here.
        """
        start = ["env", "-i", *(f"{name}={value}" for name, value in self.env.items()), *words]
        if namespaces():
            script = [*self._root(), f"exec chroot $R {shlex.join([*_as_user(self.user), *start])}"]
            return ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-ec", "\n".join(script)]
        if os.geteuid() == 0:
            self._require_reach()
            return [*_as_user(self.user), *start]
        return start

    def _root(self) -> list[str]:
        """Shell lines that mount a new root at $R. Its namespace ends with its last process."""
        mounted = [*(Path(name) for name in _OF_THE_SYSTEM), Path(sys.base_prefix), *self.image]
        lines = ["R=/mnt", _TMPFS.format(mode=755, at="$R"), "mkdir $R/tmp", _TMPFS.format(mode=1777, at="$R/tmp")]
        for path in dict.fromkeys(mounted):
            if path.is_symlink():
                lines.append(f"ln -s {shlex.quote(os.readlink(path))} {_in_root(path)}")
            elif path.exists():
                lines += [*_bind(path, path), f"mount -o remount,bind,ro {_in_root(path)}"]
        for name in ("/proc", "/sys", "/dev"):
            lines += [f"mkdir {_in_root(name)}", f"mount --rbind {name} {_in_root(name)}"]
        for name, path in self.volumes.items():
            lines += _bind(path, name)
        return [*lines, "mount -o remount,ro $R"]

    def _require_reach(self) -> None:
        if subprocess.run([*_as_user(self.user), sys.executable, "-c", ""], check=False).returncode:
            pytest.skip("no mount namespaces here, and other users may not run this Python")


def _bind(path: Path, at: Path | str) -> list[str]:
    return [f"mkdir -p {_in_root(at)}", f"mount --bind {shlex.quote(str(path))} {_in_root(at)}"]


def _in_root(path: Path | str) -> str:
    return f"$R{shlex.quote(str(path))}"


def _as_user(user: int) -> list[str]:
    only = ["--reuid", str(user), "--regid", str(user), "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
    return ["setpriv", *only]


@cache
def namespaces() -> bool:
    """Whether this process may create a mount namespace and mount in it."""
    probe = ["unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "rsm", "/mnt"]
    try:
        return os.geteuid() == 0 and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
