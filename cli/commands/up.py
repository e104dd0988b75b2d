"""`rsm up`: everything on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsm.broker import InvalidRequest
from rsm.cli.app import app, settings_of
from rsm.cli.engine_options import (
    Backend,
    EngineArg,
    MaxNumSeqs,
    Model,
    Scheduler,
    TensorParallel,
    default_backend,
    engine_config,
)
from rsm.cli.output import counted
from rsm.engine.gpu_plan import Place, places


@app.command()
def up(
    ctx: typer.Context,
    engines: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            show_default=False,
            help="Number of engines, named e0, e1, … Default: 1, or one for each --base-url.",
        ),
    ] = None,
    model: Model = "",
    backend: Backend = None,
    base_url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="URL of a running OpenAI-compatible server, which becomes one engine. May be repeated.",
        ),
    ] = None,
    routers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", show_default=False, help="Number of router processes. Default: 1."),
    ] = None,
    max_num_seqs: MaxNumSeqs = None,
    tensor_parallel: TensorParallel = 1,
    engine_arg: EngineArg = None,
    engine_scheduler: Scheduler = None,
    share_gpus: Annotated[
        bool, typer.Option("--share-gpus", help="Put several engines on a GPU if there are too few GPUs.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            show_default=False,
            help="YAML file that describes the fleet. Default: rsm.yaml in this folder, unless options describe "
            "engines.",
        ),
    ] = None,
) -> None:
    """Runs everything on this machine, in the foreground: Redis (unless one is named), routers and engines.

    Ctrl-C lets running calls finish, then stops. A second Ctrl-C stops at once. Unfinished calls stay in Redis and run
    when engines are back.
    """
    from rsm.cli.foreground import run_up
    from rsm.engine.fleet_file import NAME, read_fleet

    options = (engines, model, backend, base_url, max_num_seqs, engine_arg, engine_scheduler, share_gpus or None)
    by_options = any(option not in (None, "") for option in options) or tensor_parallel != 1
    file = config or (Path(NAME) if Path(NAME).is_file() and not by_options else None)
    settings = settings_of(ctx)
    if file is not None:
        if by_options:
            raise typer.BadParameter(f"{file} describes the engines; leave the other options out")
        fleet = read_fleet(file)
        settings = fleet.applied().with_redis(*_redis_and_namespace(ctx))
        if level := ctx.find_root().params["log_level"]:
            settings = settings.model_copy(update={"log_level": level})
        run_up(settings, fleet.engines, routers or fleet.routers, f"from {file}")
        return
    described = [
        engine_config(
            f"e{i}", model, place.gpu_id, backend, max_num_seqs, tensor_parallel, url, engine_arg, engine_scheduler
        ).with_args(place.engine_args)
        for i, (url, place) in enumerate(_places(engines, backend, base_url or [], tensor_parallel, share_gpus))
    ]
    run_up(settings, described, routers or 1)


def _redis_and_namespace(ctx: typer.Context) -> tuple[str | None, str | None]:
    """The Redis URL and the namespace from the command line. They override any file."""
    root = ctx.find_root().params
    return root["redis_url"], root["namespace"]


def _places(
    engines: int | None, backend: str | None, urls: list[str], tensor_parallel: int, share: bool
) -> list[tuple[str | None, Place]]:
    """The remote server of each engine, if any, and its GPU."""
    if urls:
        if backend not in (None, "openai"):
            raise typer.BadParameter(f"--base-url is for backend openai; leave out --backend {backend}")
        if engines not in (None, len(urls)):
            raise InvalidRequest(
                f"--engines {engines} and {counted(len(urls), 'URL')} do not fit: each server is one engine. "
                "Give --base-url once for each server, and leave --engines out."
            )
        return [(url, Place(0)) for url in urls]
    if (backend or default_backend()) != "vllm":
        return [(None, Place(0))] * (1 if engines is None else engines)
    return [(None, place) for place in places(1 if engines is None else engines, tensor_parallel, share=share)]
