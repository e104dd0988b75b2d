"""`rsm demo`: a tour of the main features in two minutes, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from rsm.broker import InvalidRequest
from rsm.cli.app import EXIT_FAILED, app
from rsm.cli.engine_options import default_backend


@app.command()
def demo(
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="vllm (with a tiny test model) or sim (modelled engines). Default: vllm if installed, else sim.",
        ),
    ] = "",
) -> None:
    """Shows streaming, cache affinity, cancellation and the death of an engine on a fleet of its own.

    It starts its own Redis and touches nothing else. Exits with status 1 if a check fails.
    """
    if backend not in ("", "vllm", "sim"):
        raise InvalidRequest(f"--backend must be vllm or sim; got {backend!r}.")
    from rsm.cli.demo.story import run_demo

    if not run_demo(backend or default_backend(), chosen=bool(backend)):
        raise typer.Exit(EXIT_FAILED)
