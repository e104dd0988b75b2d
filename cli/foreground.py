"""`rsm up`: a deployment on this machine, in the foreground.

1. Redis, unless one is named: the embedded server in the user's state folder, so that `rsm ps` and `redis-cli` in
   another terminal find it with no setting, and calls survive until the next `rsm up`.
2. Routers and workers as supervised children that write to this terminal.
3. The first Ctrl-C (or SIGTERM, or a closed terminal) drains; the second kills, and still leaves no process.
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
from rsm.cli.output import console
from rsm.engine.fleet import Fleet
from rsm.workers.config import EngineConfig

log = logging.getLogger("rsm.up")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_up(settings: Settings, configs: Sequence[EngineConfig], routers: int, source: str = "") -> None:
    """Runs the fleet until a signal. `source`: where it is written down, if it is.

    Raises:
        EngineFailed, BrokerUnavailable: it did not come up; nothing is left running.
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
            log.info("starting %d engines, %d routers%s; Redis: %s", len(configs), routers, named, _where(settings))
            fleet.start(configs)
            _say_whats_next(fleet.settings, configs, embedded)
            threading.Event().wait()
    except KeyboardInterrupt:
        pass
    except RsmError:
        if not stopping.asked:
            raise
    log.info("everything has stopped")


def _where(settings: Settings) -> str:
    return shown_url(settings.url())


class Stopping:
    """A context that ends on the first signal, by KeyboardInterrupt, and then stops the fleet.

    Further signals kill the children, so that the orderly stop, which goes on, has nothing left to wait for.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._leaving = False
        self.asked = 0

    def __enter__(self) -> Stopping:
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        # The signals stay with us: another Ctrl-C must not cut the last steps short.
        self._leaving = True
        self._fleet.stop()

    def _on_signal(self, *_: object) -> None:
        self.asked += 1
        if self.asked == 1 and not self._leaving:
            grace = self._fleet.settings.drain_grace_s
            log.info("stopping: running calls may finish within %g s; once more stops at once", grace)
            raise KeyboardInterrupt
        log.warning("stopping at once; what was running goes on when engines are back")
        for part in [*self._fleet.workers.values(), *self._fleet.routers]:
            part.request_stop()  # so that its supervisor does not start it again
            _kill_group(part.pid)


def _kill_group(pid: int | None) -> None:
    """Each part leads a process group of its own, which holds whatever its engine has started."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


# -- what to try next


def _say_whats_next(settings: Settings, configs: Sequence[EngineConfig], embedded: bool) -> None:
    out = console()
    out.print()
    for sentence in _what_runs(configs):
        out.print(Text(sentence, style="bold green"), soft_wrap=True)
    out.print(Text("Try in another terminal:", style="bold"))
    for line in next_lines(settings, embedded):
        out.print(Text(f"  {line}"), soft_wrap=True)
    out.print(Text("Ctrl-C stops everything in order.", style="dim"))
    out.print()


def _what_runs(configs: Sequence[EngineConfig]) -> list[str]:
    if not configs:
        return ["Ready, without engines: start them with `rsm worker`, here or on other hosts."]
    backend, engines = configs[0].backend, ", ".join(c.engine_id for c in configs)
    said = [f"Ready: {engines} ({backend}{', ' + configs[0].model if configs[0].model else ''})."]
    if backend == "sim":
        said.append("These engines are simulated: their timing is modelled, their text is made up and of no model.")
    elif backend == "vllm" and not configs[0].model:
        said.append("No --model was named, so vLLM serves a tiny random one: its text is noise.")
    return said


def next_lines(settings: Settings, embedded: bool) -> list[str]:
    """Commands that work as they stand in another shell."""
    prefix = f"{{{settings.namespace}}}:"
    cli = redis_cli(settings)
    body = shlex.quote('{"prompt":"hi","max_tokens":8}')
    return [
        *_exports(settings, embedded),
        'rsm submit "Explain quantum computing" --max-tokens 32',
        "rsm ps            # also: rsm engines, rsm sessions, rsm stats, rsm doctor",
        f"{cli} XADD {shlex.quote(prefix + 'calls')} '*' id c1 session s1 json {body}",
        f"{cli} HGETALL {shlex.quote(prefix + 'call:c1')}",
        *([] if shutil.which(cli.split()[0]) else ["# The last two need redis-cli, which is not on the PATH here."]),
    ]


def _exports(settings: Settings, embedded: bool) -> list[str]:
    """Settings without which other commands would not find this deployment. Never a password."""
    lines = []
    if not embedded:
        lines.append(f"export RSM_REDIS_URL={shlex.quote(_where(settings))}   # with user and password, if any")
    elif settings.data_dir != _default_folder():
        lines.append(f"export RSM_DATA_DIR={shlex.quote(str(settings.data_dir))}")
    if settings.namespace != "rsm":
        lines.append(f"export RSM_NAMESPACE={settings.namespace}")
    return lines


def _default_folder() -> Path | None:
    """Where other commands look for the embedded server on their own; None = this user has no home."""
    with contextlib.suppress(InvalidRequest):
        return Settings.model_construct().state_dir()
    return None


def redis_cli(settings: Settings) -> str:
    """A redis-cli that reaches this server; it takes a password from REDISCLI_AUTH."""
    program = next((name for name in ("redis-cli", "valkey-cli") if shutil.which(name)), "redis-cli")
    url = _where(settings)
    if url.startswith("unix://"):
        return f"{program} -s {shlex.quote(url.removeprefix('unix://'))}"
    return f"{program} -u {shlex.quote(url)}"
