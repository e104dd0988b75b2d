"""`rsm simulate`: a fleet in virtual time. It needs no Redis."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer

from rsm.broker import InvalidRequest
from rsm.cli.app import app, settings_of
from rsm.cli.engine_options import EngineArg, Slots, pair
from rsm.cli.options import Json
from rsm.cli.output import counted, emit_json, note, show, table

_HOUR_S = 3600.0


@app.command()
def simulate(
    ctx: typer.Context,
    workload: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Programs as JSON lines. Default: conversations that arrive at --rate."),
    ] = None,
    rate: Annotated[
        float, typer.Option(min=0.001, metavar="N", help="Conversations per second, for the whole fleet.")
    ] = 1.0,
    seconds: Annotated[
        float, typer.Option(min=1.0, metavar="SECONDS", help="Virtual time after which the run ends.")
    ] = _HOUR_S,
    engines: Annotated[int, typer.Option(min=1, metavar="N", help="Number of engines.")] = 1,
    policy: Annotated[
        str, typer.Option(metavar="NAME", help="Routing policy, or package.module:Class. Default: RSM_POLICY.")
    ] = "",
    engine_scheduler: Annotated[
        str, typer.Option(metavar="NAME", help="Scheduler of the engines: fcfs, priority or plas.")
    ] = "plas",
    times_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Output file of `rsm calibrate`. Default: an 8B model on one H100, by its data sheet.",
        ),
    ] = None,
    max_num_seqs: Slots = 256,
    engine_arg: EngineArg = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of the conversations and of the run.")] = 1,
    json: Json = False,
) -> None:
    """Simulates a fleet in virtual time and reports latencies and throughput.

    It uses the routing policies and schedulers of real deployments. It needs neither Redis nor engines.
    An hour of many engines takes about a minute.
    """
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
    show(table(f"{engines} x {sim.model}, {config.policy}, {sim.scheduler}", ("", ""), rows))
    if figures["unfinished"] and seconds < inf:
        note(f"{counted(figures['unfinished'], 'program')} had arrived but not finished after {seconds:g} s.")


_LABELS = {
    "until_s": "virtual time, s",
    "response_mean_s": "program response time, mean, s",
    "response_p95_s": "… p95, s",
    "response_p99_s": "… p99, s",
    "token_mean_s": "program latency per token, mean, s",
    "token_p95_s": "… p95, s",
    "token_p99_s": "… p99, s",
    "call_wait_mean_s": "call waiting time, mean, s",
    "call_wait_p99_s": "… p99, s",
    "output_tokens_per_s": "output tokens/s",
    "hit_rate": "share of prompt tokens cached",
    "busy": "share of time that engines are busy",
    "wall_s": "real time, s",
}


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
