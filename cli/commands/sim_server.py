"""`rsm sim-server`: a modelled engine behind OpenAI's HTTP API. It needs no Redis."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from rsm.broker import logs
from rsm.cli.app import app, settings_of
from rsm.cli.engine_options import EngineArg, Slots, engine_config
from rsm.cli.output import say


@app.command("sim-server")
def sim_server(
    ctx: typer.Context,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, metavar="N", help="Port to listen on. 0 takes a free one; the first line names it."
        ),
    ],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Model name to serve. Default: that of the simulated model.")
    ] = "",
    max_num_seqs: Slots = 256,
    engine_arg: EngineArg = None,
) -> None:
    """Serves a modelled engine over OpenAI's HTTP API, as `vllm serve` does with a real one.

    Useful for testing and measuring clients of such servers: `--backend openai`, and other products' routers.
    """
    from rsm.workers.backends.factory import create_backend
    from rsm.workers.backends.sim.backend import SimBackend
    from rsm.workers.backends.sim.server import serve

    logs.configure(settings_of(ctx), "sim-server")
    config = engine_config("sim-server", model, 0, "sim", max_num_seqs, 1, None, engine_arg)
    backend = create_backend(config, settings_of(ctx))
    assert isinstance(backend, SimBackend)  # noqa: S101
    name = backend.config.model

    def announce(at: int) -> None:
        say(f"Listening on http://{host}:{at}/v1 with model {name}.")

    asyncio.run(serve(backend, host, port, settings_of(ctx).drain_grace_s, announce))
