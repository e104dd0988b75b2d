"""The whole story in two minutes: `rsm demo`. Also a smoke test: it fails if anything is not as promised.

Nothing shown is written down beforehand: all figures are of this very run.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Literal, cast

from rich.console import Console
from rich.text import Text

from rsm.broker.errors import RsmError
from rsm.cli.demo import acts
from rsm.cli.demo.stage import Stage
from rsm.cli.output import console, seconds
from rsm.engine.gpu_plan import Place, places
from rsm.workers.backends.vllm.start.gpus import on_gpu
from rsm.workers.config import EngineConfig

# Modelled steps long enough to watch: 50 tokens a second for each call.
_SIM_ARGS = {"step_s": 0.02}
# On a GPU: small and set, so that both engines fit on one, and beside whatever else runs there; and quick to start.
_GPU_ARGS = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 512 << 20, "enforce_eager": True}
_ENGINES = 2
_COLUMNS = 110


def run_demo(backend: str, chosen: bool) -> bool:
    """Runs all acts; True if every promise was kept.

    Args:
        chosen: whether the user named the backend; if not, the demo says why it took this one.
    """
    out, began = console(wide=_COLUMNS), time.monotonic()
    _introduce(out, backend, chosen)
    stage = Stage(_configs(backend), out)
    out.print(f"Starting Redis, a router and two engines{_patience(backend)}. Logs: {stage.log_file}", soft_wrap=True)
    try:
        with stage:
            out.print(f"Ready after {seconds((time.monotonic() - began) * 1000)}.")
            _play(stage)
    except (RsmError, TimeoutError) as e:
        stage.promise(False, f"the demo runs to its end: {e}")
    out.print()
    return _conclude(stage, time.monotonic() - began)


def _play(stage: Stage) -> None:
    pace = acts.stream_one(stage)
    acts.follow_an_agent(stage)
    acts.cancel_a_session(stage)
    acts.kill_an_engine(stage, pace)
    acts.close_the_books(stage)


def _configs(backend: str) -> list[EngineConfig]:
    """A GPU each where there are several; with one they share it; with none vLLM runs on the CPU."""
    name = cast(Literal["vllm", "sim"], backend)
    args = dict(_SIM_ARGS) if backend == "sim" else dict(_GPU_ARGS) if on_gpu() else {}
    seats = places(_ENGINES, share=True) if backend == "vllm" else [Place(0)] * _ENGINES
    return [
        EngineConfig(engine_id=f"e{i}", gpu_id=seat.gpu_id, backend=name, max_num_seqs=32, engine_args=args)
        for i, seat in enumerate(seats)
    ]


def _patience(backend: str) -> str:
    if backend == "sim":
        return ""
    return "; vLLM takes a minute or two to load on a GPU" if on_gpu() else "; vLLM takes half a minute to load"


def _introduce(out: Console, backend: str, chosen: bool) -> None:
    if backend == "vllm":
        said = "Two real vLLM engines serve a tiny random model: the text is noise, everything else is real."
    else:
        why = "" if chosen else "vLLM is not installed, so "
        said = f"{why}two simulated engines: their timing is modelled, their text is made up and of no model."
    out.print(Text(said[0].upper() + said[1:], style="bold"), soft_wrap=True)


def _next_lines(backend: str) -> list[str]:
    """Three commands that go on where the demo ends; with the path of the environment that it runs in."""
    rsm = shlex.quote(sys.argv[0]) if Path(sys.argv[0]).name == "rsm" else "rsm"
    return [
        f"{rsm} up --engines 2 --backend {backend}      # a fleet of your own, here; Ctrl-C ends it",
        f'{rsm} submit "Explain quantum computing" --stream   # in a second terminal',
        f"{rsm} ps --watch                             # in a third",
    ]


def _conclude(stage: Stage, took_s: float) -> bool:
    if not stage.broken:
        stage.out.print(Text(f"All as promised, in {seconds(took_s * 1000)}.", style="bold green"))
        stage.out.print(Text("Next, in this folder:", style="bold"))
        for line in _next_lines(stage.backend):
            stage.out.print(Text(f"  {line}"), soft_wrap=True)
        return True
    stage.out.print(Text(f"NOT as promised ({len(stage.broken)}):", style="bold red"))
    for sentence in stage.broken:
        stage.out.print(Text(f"  {sentence}", style="red"), soft_wrap=True)
    stage.out.print(f"The processes' logs: {stage.log_file}", soft_wrap=True)
    return False
