"""`rsm simulate`: a fleet in virtual time. It needs no Redis."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer

from rsm.broker import InvalidRequest
from rsm.cli.app import app, settings_of
from rsm.cli.commands.views import Json
from rsm.cli.options import EngineArg, MaxNumSeqs, pair
from rsm.cli.output import console, emit_json, note, table

_HOUR_S = 3600.0


@app.command()
def simulate(
    ctx: typer.Context,
    workload: Annotated[
        Path | None, typer.Option(help="Programs as JSON lines; none = conversations that come at --rate.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.001, help="Conversations a second, for the whole fleet.")] = 1.0,
    seconds: Annotated[float, typer.Option(min=1.0, help="Virtual time after which the run is broken off.")] = _HOUR_S,
    engines: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    policy: Annotated[
        str, typer.Option(help="Routing policy, by name or package.module:Class; none = RSM_POLICY.")
    ] = "",
    engine_scheduler: Annotated[str, typer.Option(help="Inside the engines: fcfs, priority or plas.")] = "plas",
    times_file: Annotated[
        Path | None, typer.Option(help="What `rsm calibrate` wrote; none = an 8B model on one H100, by its data sheet.")
    ] = None,
    max_num_seqs: MaxNumSeqs = 256,
    engine_arg: EngineArg = None,
    seed: Annotated[int, typer.Option(help="Of the conversations, and of what varies in the run.")] = 1,
    json: Json = False,
) -> None:
    """Runs a fleet in virtual time, with the router's own policies and the schedulers' own code, and says how programs
    fared. Needs no Redis and no engine; an hour of many engines takes about a minute."""
    from rsm.simulation.fleet import FleetConfig, SimFleet
    from rsm.simulation.summary import summary
    from rsm.simulation.workload.conversations import conversations
    from rsm.simulation.workload.files import read_workload
    from rsm.workers.backends.sim.config import config_of

    args: dict[str, Any] = dict(map(pair, engine_arg or [])) | {"scheduler": engine_scheduler}
    if times_file is not None:
        args["times_file"] = times_file
    try:
        sim = config_of({"max_num_seqs": max_num_seqs, **args})
    except (TypeError, ValueError) as e:
        raise InvalidRequest(f"These engines cannot be simulated: {e}") from e
    settings = settings_of(ctx)
    config = FleetConfig(
        engines=engines, sim=sim, policy=policy or settings.policy, settings=settings, horizon_s=seconds
    )
    programs = conversations(rate, seconds, seed) if workload is None else read_workload(workload)
    results = SimFleet(config, seed).run(programs)
    figures = summary(results)
    if json:
        emit_json(figures)
        return
    rows = [(_LABELS.get(name, name), _shown(value)) for name, value in figures.items()]
    console().print(table(f"{engines} x {sim.model}, {config.policy}, {sim.scheduler}", ("", ""), rows))
    if figures["unfinished"] and seconds < inf:
        note(f"{figures['unfinished']} programs had come and were not done after {seconds:g} s.")


_LABELS = {
    "until_s": "virtual time, s",
    "response_mean_s": "response time of a program, mean, s",
    "response_p95_s": "… p95, s",
    "response_p99_s": "… p99, s",
    "token_mean_s": "latency per token of a program, mean, s",
    "token_p95_s": "… p95, s",
    "token_p99_s": "… p99, s",
    "call_wait_mean_s": "wait of a call for its place, mean, s",
    "call_wait_p99_s": "… p99, s",
    "output_tokens_per_s": "output tokens/s",
    "hit_rate": "prompt tokens found in caches",
    "busy": "engines' time in steps",
    "wall_s": "real time, s",
}


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
