"""`rsm acl`: Redis users for the processes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rsm.broker import InvalidRequest
from rsm.broker.protocol.acl import ROLES, acl_file, password_hash
from rsm.cli.app import app, settings_of
from rsm.cli.files import read_text


@app.command()
def acl(
    ctx: typer.Context,
    passwords: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="File with a role and its password on each line; - reads stdin. Users without a password are locked.",
        ),
    ] = "",
) -> None:
    """Prints a Redis ACL file for this namespace: one user per role, passwords as hashes. See docs/operations.md."""
    given = read_text(passwords, "The password file") if passwords else ""
    sys.stdout.write(acl_file(settings_of(ctx).namespace, _hashes(given)))


def _hashes(lines: str) -> dict[str, str]:
    hashes = {}
    for line in filter(str.strip, lines.splitlines()):
        role, _, password = line.strip().partition(" ")
        if role not in (*ROLES, "default") or not password.strip():
            roles = ", ".join(["default", *ROLES])
            raise InvalidRequest(f"Each line of the password file must hold a role ({roles}), a space and a password.")
        hashes[role] = password_hash(password.strip())
    return hashes
