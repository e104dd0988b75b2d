"""`rsm sim-server` in its own process."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.support.rsm_command import RSM, clean_env

# A token takes 10 ms; nothing else takes time.
STEPS = ("step_s=0.01", "prefill_token_s=0", "decode_seq_s=0", "context_token_s=0")


@dataclass(frozen=True, slots=True)
class SimHttp:
    """A running server. `url` has no API version."""

    url: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def sim_server(*engine_args: str, port: int = 0, model: str = "m") -> Iterator[SimHttp]:
    """One listening server. It is killed at the end."""
    command = [RSM, "sim-server", "--port", str(port), "--model", model, "--log-level", "WARNING"]
    command += [part for arg in engine_args or STEPS for part in ("--engine-arg", arg)]
    process = subprocess.Popen(command, env=clean_env(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+:\d+", process.stdout.readline())
        assert found is not None, "it did not say where it listens"
        yield SimHttp(found[0], process)
    finally:
        process.kill()
        process.communicate()
