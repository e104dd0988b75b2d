"""`rsm demo`: all acts in two minutes. Also a smoke test: it fails if a check fails.

All figures that it shows are measured in this run.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, cast

import redis
from rich.console import Console
from rich.text import Text

from rsm.broker.errors import RsmError
from rsm.cli.demo import acts
from rsm.cli.demo.stage import Stage
from rsm.cli.output import console, counted, seconds
from rsm.cli.streams import OutputLost
from rsm.engine.gpu_plan import Place, places
from rsm.workers.backends.vllm.start.gpus import on_gpu
from rsm.workers.config import EngineConfig

# Simulated steps that are long enough to watch: 50 tokens a second for each call.
_SIM_ARGS = {"step_s": 0.02}
# On a GPU: small and fixed, so that both engines fit on one GPU beside other work, and quick to start.
_GPU_ARGS = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 512 << 20, "enforce_eager": True}
_ENGINES = 2
_COLUMNS = 110


def run_demo(backend: str, chosen: bool) -> bool:
    """Runs all acts. Returns whether every check passed; if not, the last line printed names the log.

    Args:
        chosen: whether the user named the backend. If not, the demo says why it uses this one.
    """
    out, configs = console(wide=_COLUMNS), _configs(backend)
    _introduce(out, backend, chosen)
    folder = Path(tempfile.mkdtemp(prefix="rsm-demo-"))
    stage, failed = Stage(configs, out, folder / "processes.log"), True
    try:
        _run(stage)
        failed = bool(stage.failures)
    except (KeyboardInterrupt, OutputLost):
        failed = False
        raise
    finally:
        if failed:
            out.print(f"The log of its processes: {stage.log_file}", soft_wrap=True)
        else:
            shutil.rmtree(folder)
    return not failed


def _run(stage: Stage) -> None:
    out, began = stage.out, time.monotonic()
    out.print(f"Starting Redis, a router and two engines{_duration(stage.backend)}.", soft_wrap=True)
    out.print(Text(f"Log: {stage.log_file}", style="dim"), soft_wrap=True)
    try:
        with stage:
            out.print(f"Ready after {seconds((time.monotonic() - began) * 1000)}.")
            _play(stage)
    except (RsmError, redis.RedisError, OSError) as e:
        stage.check(False, f"the demo runs to its end: {e}")
    out.print()
    _conclude(stage, time.monotonic() - began)


def _play(stage: Stage) -> None:
    pace = acts.stream_one(stage)
    acts.follow_an_agent(stage)
    acts.cancel_a_session(stage)
    acts.kill_an_engine(stage, pace)
    acts.count_all_calls(stage)


def _configs(backend: str) -> list[EngineConfig]:
    """One GPU for each engine if there are several; a single one is shared. Without a GPU, vLLM runs on the CPU."""
    name = cast(Literal["vllm", "sim"], backend)
    args = dict(_SIM_ARGS) if backend == "sim" else dict(_GPU_ARGS) if on_gpu() else {}
    seats = places(_ENGINES, share=True) if backend == "vllm" else [Place(0)] * _ENGINES
    return [
        EngineConfig(engine_id=f"e{i}", gpu_id=seat.gpu_id, backend=name, max_num_seqs=32, engine_args=args)
        for i, seat in enumerate(seats)
    ]


def _duration(backend: str) -> str:
    if backend == "sim":
        return ""
    return "; vLLM takes a minute or two to load on a GPU" if on_gpu() else "; vLLM takes half a minute to load"


def _introduce(out: Console, backend: str, chosen: bool) -> None:
    if backend == "vllm":
        lines = "Two real vLLM engines serve a tiny model with random weights. Only its text is meaningless."
    else:
        why = "" if chosen else "vLLM is not installed. "
        lines = f"{why}Two modelled engines serve this demo: their timing is modelled, and their text is meaningless."
    out.print(Text(lines, style="bold"), soft_wrap=True)


def _next_lines(backend: str) -> list[str]:
    """Commands to try next, with the path of the environment that the demo runs in."""
    rsm = shlex.quote(sys.argv[0]) if Path(sys.argv[0]).name == "rsm" else "rsm"
    lines = {
        f"{rsm} up --engines 2 --backend {backend}": "a fleet of your own; Ctrl-C ends it",
        f'{rsm} submit "Explain quantum computing" --stream': "in a second terminal",
        f"{rsm} ps --watch": "in a third terminal",
    }
    longest = max(map(len, lines))
    return [f"{command:{longest}}  # {comment}" for command, comment in lines.items()]


def _conclude(stage: Stage, took_s: float) -> None:
    if stage.failures:
        stage.out.print(Text(f"{counted(len(stage.failures), 'check')} FAILED:", style="bold red"))
        for statement in stage.failures:
            stage.out.print(Text(f"  {statement}", style="red"), soft_wrap=True)
        return
    stage.out.print(Text(f"All checks passed, in {seconds(took_s * 1000)}.", style="bold green"))
    stage.out.print(Text("Next, in this folder:", style="bold"))
    for line in _next_lines(stage.backend):
        stage.out.print(Text(f"  {line}"), soft_wrap=True)
