"""`rsm calibrate`: fits the modelled engine to the speed of vLLM on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from rsm.broker import InvalidRequest
from rsm.cli.app import app, settings_of
from rsm.cli.engine_options import EngineArg, Gpu, Slots, TensorParallel, engine_config
from rsm.cli.files import require_writable
from rsm.cli.output import note, say, show, table


@app.command()
def calibrate(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write, for `--times-file`.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="Model name or path. Default: a tiny test model.")] = "",
    gpu: Gpu = 0,
    max_num_seqs: Slots = 256,
    tensor_parallel: TensorParallel = 1,
    engine_arg: EngineArg = None,
    seconds: Annotated[
        float, typer.Option(min=1.0, metavar="SECONDS", help="How long to test the fit with calls at random times.")
    ] = 20.0,
) -> None:
    """Measures vLLM's steps on this machine and fits the modelled engine to them.

    `rsm simulate --times-file FILE` and `rsm worker --backend sim --engine-arg times_file=FILE` use the result.
    """
    from rsm.simulation.calibration.measure import calibrate as measure

    require_writable(out, "The figures")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    note("Starting vLLM to measure it. This takes some minutes.")
    config = engine_config("calibrate", model, gpu, "vllm", max_num_seqs, tensor_parallel, None, engine_arg)
    found = measure(config, settings_of(ctx), seconds)
    try:
        out.write_text(json.dumps(found.document(), indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise InvalidRequest(f"The figures cannot be written to {out}: {e.strerror}.") from e
    show(table("Costs in seconds", ("", ""), [(name, f"{s:.3g}") for name, s in found.times.items()]))
    for name, error in (("fitted steps", found.fitted), ("held-out steps", found.held_out)):
        say(
            f"{name}: {error.steps}; error per step: median {error.median:.1%}, p90 {error.p90:.1%}; "
            f"modelled / measured total time: {error.total:.3f}"
        )
