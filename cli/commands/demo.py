"""`rsm demo`: the whole story in two minutes on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from rsm.broker import InvalidRequest
from rsm.cli.app import EXIT_FAILED, app
from rsm.cli.engine_options import default_backend


@app.command()
def demo(
    backend: Annotated[str, typer.Option(help="vllm (a tiny model on the CPU) or sim; none = vllm if installed.")] = "",
) -> None:
    """Streams, keeps a program where its cache is, cancels on two engines, kills an engine; and loses nothing.

    It has a Redis of its own and touches nothing else. Exit status 1 if anything is not as promised.
    """
    if backend not in ("", "vllm", "sim"):
        raise InvalidRequest(f"--backend must be vllm or sim; got {backend!r}.")
    from rsm.cli.demo.story import run_demo

    if not run_demo(backend or default_backend(), chosen=bool(backend)):
        raise typer.Exit(EXIT_FAILED)
