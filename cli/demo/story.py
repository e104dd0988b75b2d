"""The whole story in two minutes: `rsm demo`. Also a smoke test: it fails if anything is not as promised.

Nothing shown is written down beforehand: all figures are of this very run.
"""

from __future__ import annotations

import time
from typing import Literal, cast

from rich.console import Console
from rich.text import Text

from rsm.broker.errors import RsmError
from rsm.cli.demo import acts
from rsm.cli.demo.stage import Stage
from rsm.cli.output import console, seconds
from rsm.workers.config import EngineConfig

# Modelled steps long enough to watch: 50 tokens a second for each call.
_SIM_ARGS = {"step_s": 0.02}
_COLUMNS = 110


def run_demo(backend: str, chosen: bool) -> bool:
    """Runs all acts; True if every promise was kept.

    Args:
        chosen: whether the user named the backend; if not, the demo says why it took this one.
    """
    out, began = console(wide=_COLUMNS), time.monotonic()
    _introduce(out, backend, chosen)
    stage = Stage([_config(f"e{i}", i, backend) for i in range(2)], out)
    out.print(f"Starting Redis, a router and two engines; their logs: {stage.log_file}", soft_wrap=True)
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


def _config(engine_id: str, gpu: int, backend: str) -> EngineConfig:
    name = cast(Literal["vllm", "sim"], backend)
    args = dict(_SIM_ARGS) if backend == "sim" else {}
    return EngineConfig(engine_id=engine_id, gpu_id=gpu, backend=name, max_num_seqs=32, engine_args=args)


def _introduce(out: Console, backend: str, chosen: bool) -> None:
    if backend == "vllm":
        said = "Two real vLLM engines serve a tiny random model: the text is noise, everything else is real."
    else:
        why = "" if chosen else "vLLM is not installed, so "
        said = f"{why}two simulated engines: their timing is modelled, their text is made up and of no model."
    out.print(Text(said[0].upper() + said[1:], style="bold"), soft_wrap=True)


def _conclude(stage: Stage, took_s: float) -> bool:
    if not stage.broken:
        stage.out.print(Text(f"All as promised, in {seconds(took_s * 1000)}.", style="bold green"))
        return True
    stage.out.print(Text(f"NOT as promised ({len(stage.broken)}):", style="bold red"))
    for sentence in stage.broken:
        stage.out.print(Text(f"  {sentence}", style="red"), soft_wrap=True)
    stage.out.print(f"The parts' logs: {stage.log_file}", soft_wrap=True)
    return False
