"""`rsm calibrate`: the modelled engine is given the speed of the real one on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from rsm.broker import InvalidRequest
from rsm.cli.app import app, settings_of
from rsm.cli.engine_options import EngineArg, MaxNumSeqs, Model, TensorParallel, engine_config
from rsm.cli.files import require_writable
from rsm.cli.output import note, say, show, table


@app.command()
def calibrate(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go; `--times-file` reads it.")],
    model: Model = "",
    gpu: Annotated[int, typer.Option(min=0, help="The first of its GPUs.")] = 0,
    max_num_seqs: MaxNumSeqs = 256,
    tensor_parallel: TensorParallel = 1,
    engine_arg: EngineArg = None,
    seconds: Annotated[
        float, typer.Option(min=1.0, metavar="SECONDS", help="How long calls arrive at random, to test the fit.")
    ] = 20.0,
) -> None:
    """Measures vLLM's steps on this machine and fits the modelled engine to them.

    The file is read by `rsm simulate --times-file FILE` and `rsm worker --backend sim --engine-arg times_file=FILE`.
    """
    from rsm.simulation.calibration.measure import calibrate as measure

    require_writable(out, "The figures")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    note("Starting vLLM and measuring it. This takes minutes.")
    config = engine_config("calibrate", model, gpu, "vllm", max_num_seqs, tensor_parallel, None, engine_arg)
    found = measure(config, settings_of(ctx), seconds)
    try:
        out.write_text(json.dumps(found.document(), indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise InvalidRequest(f"The figures cannot be written to {out}: {e.strerror}.") from e
    show(table("Costs in seconds", ("", ""), [(name, f"{s:.3g}") for name, s in found.times.items()]))
    for name, far in (("steps of which the fit was made", found.fitted), ("calls at random", found.held_out)):
        say(
            f"{name}: {far.steps} steps; error of one: median {far.median:.1%}, p90 {far.p90:.1%}; "
            f"modelled / measured time of all: {far.total:.3f}"
        )
