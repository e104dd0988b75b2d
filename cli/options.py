"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rsm.cli.output import on_terminal

Form = Literal["table", "wide", "json"]

Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
Output = Annotated[
    Form | None,
    typer.Option(
        "--output", "-o", help="wide shows whole ids and all columns. Default: table on a terminal, else wide."
    ),
]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Refresh every second until Ctrl-C.")]


def form_of(output: Form | None, json: bool) -> Form:
    """The form that the options select."""
    if json and output not in (None, "json"):
        raise typer.BadParameter(f"--json and --output {output} contradict each other; leave one out")
    if json:
        return "json"
    return output or ("table" if on_terminal() else "wide")
