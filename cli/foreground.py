"""`rsm up`: a deployment on this machine, in the foreground.

1. Starts Redis unless one is named: the embedded server, in the user's state folder. So `rsm ps` and `redis-cli` in
   another terminal find it without any setting, and calls survive until the next `rsm up`.
2. Starts routers and workers as supervised children that log to this terminal.
3. Drains on the first Ctrl-C, SIGTERM or closed terminal. Kills on the second. Leaves no process behind either way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from rsm.broker import Settings, logs
from rsm.broker.connection.topology import shown_url
from rsm.broker.errors import InvalidRequest, RsmError
from rsm.cli.app import require_redis
from rsm.cli.output import console, counted
from rsm.engine.fleet import Fleet
from rsm.workers.config import EngineConfig

log = logging.getLogger("rsm.up")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_up(settings: Settings, configs: Sequence[EngineConfig], routers: int, source: str = "") -> None:
    """Runs the fleet until a signal. `source` names the file that describes it, if any.

    Raises:
        EngineFailed, BrokerUnavailable: the start failed; nothing is left running.
    """
    logs.configure(settings, "up")
    embedded = settings.redis_url is None
    if embedded:
        settings = settings.model_copy(update={"data_dir": settings.state_dir()})
    else:
        require_redis(settings)
    fleet = Fleet(settings, routers=routers)
    stopping = Stopping(fleet)
    try:
        with stopping:
            named = f" ({source})" if source else ""
            processes = f"{counted(len(configs), 'engine')} and {counted(routers, 'router')}"
            log.info("starting %s%s; Redis: %s", processes, named, _where(settings))
            fleet.start(configs)
            _print_next_steps(fleet.settings, configs, embedded)
            threading.Event().wait()
    except KeyboardInterrupt:
        pass
    except RsmError:
        if not stopping.signals:
            raise
    log.info("all processes have stopped")


def _where(settings: Settings) -> str:
    return shown_url(settings.url())


class Stopping:
    """A context that the first signal ends with KeyboardInterrupt, and that then stops the fleet.

    Further signals kill the children, so the orderly stop has nothing left to wait for.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._leaving = False
        self.signals = 0

    def __enter__(self) -> Stopping:
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        # The handlers stay installed: another Ctrl-C must not cut the last steps short.
        self._leaving = True
        self._fleet.stop()

    def _on_signal(self, *_: object) -> None:
        self.signals += 1
        if self.signals == 1 and not self._leaving:
            grace = self._fleet.settings.drain_grace_s
            log.info("stopping: running calls have %g s to finish; another Ctrl-C stops at once", grace)
            raise KeyboardInterrupt
        log.warning("stopping at once; interrupted calls resume when engines are back")
        # In a thread: the signal may have interrupted the orderly stop where it holds a lock that this needs, too.
        threading.Thread(target=self._kill_all, name="rsm-up-kill").start()

    def _kill_all(self) -> None:
        for process in [*self._fleet.workers.values(), *self._fleet.routers]:
            process.request_stop()  # so that its supervisor does not restart it
            _kill_group(process.pid)


def _kill_group(pid: int | None) -> None:
    """Kills a process and everything that it started: each one leads a process group of its own."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


# -- what to try next


def _print_next_steps(settings: Settings, configs: Sequence[EngineConfig], embedded: bool) -> None:
    out = console()
    out.print()
    for line in _what_runs(configs):
        out.print(Text(line, style="bold green"), soft_wrap=True)
    out.print(Text("Try in another terminal:", style="bold"))
    for line in next_lines(settings, embedded):
        out.print(Text(f"  {line}"), soft_wrap=True)
    out.print(Text("Ctrl-C lets running calls finish, then stops everything.", style="dim"))
    out.print()


def _what_runs(configs: Sequence[EngineConfig]) -> list[str]:
    if not configs:
        return ["Ready, without engines. Start them with `rsm worker`, here or on other hosts."]
    backend, engines = configs[0].backend, ", ".join(c.engine_id for c in configs)
    lines = [f"Ready: {engines} ({backend}{', ' + configs[0].model if configs[0].model else ''})."]
    if backend == "sim":
        lines.append("These engines are simulated: their timing is modelled, and their text is meaningless.")
    elif backend == "vllm" and not configs[0].model:
        lines.append("Without --model, vLLM serves a tiny test model with random weights: its text is meaningless.")
    return lines


def next_lines(settings: Settings, embedded: bool) -> list[str]:
    """Commands that work in another shell as they are printed."""
    prefix = f"{{{settings.namespace}}}:"
    cli = redis_cli(settings)
    body = shlex.quote('{"prompt":"hi","max_tokens":8}')
    return [
        *_exports(settings, embedded),
        'rsm submit "Explain quantum computing" --max-tokens 32',
        "rsm ps            # also: rsm engines, rsm sessions, rsm stats, rsm doctor",
        f"{cli} XADD {shlex.quote(prefix + 'calls')} '*' id c1 session s1 json {body}",
        f"{cli} HGETALL {shlex.quote(prefix + 'call:c1')}",
        *([] if shutil.which(cli.split()[0]) else ["# The last two need redis-cli, which is not on this PATH."]),
    ]


def _exports(settings: Settings, embedded: bool) -> list[str]:
    """Settings that other commands need to find this deployment. Never a password."""
    lines = []
    if not embedded:
        lines.append(f"export RSM_REDIS_URL={shlex.quote(_where(settings))}   # with user and password, if any")
    elif settings.data_dir != _default_folder():
        lines.append(f"export RSM_DATA_DIR={shlex.quote(str(settings.data_dir))}")
    if settings.namespace != "rsm":
        lines.append(f"export RSM_NAMESPACE={settings.namespace}")
    return lines


def _default_folder() -> Path | None:
    """Where other commands look for the embedded server by default. None if this user has no home."""
    with contextlib.suppress(InvalidRequest):
        return Settings.model_construct().state_dir()
    return None


def redis_cli(settings: Settings) -> str:
    """The redis-cli command that reaches this server. It takes a password from REDISCLI_AUTH."""
    program = next((name for name in ("redis-cli", "valkey-cli") if shutil.which(name)), "redis-cli")
    url = _where(settings)
    if url.startswith("unix://"):
        return f"{program} -s {shlex.quote(url.removeprefix('unix://'))}"
    return f"{program} -u {shlex.quote(url)}"
