"""The `rsm` command, also `python -m rsm`. The application is `rsm.cli`, whose dependencies are an extra."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

_NEEDS = ("typer", "rich")


def main() -> None:
    """The entry point of the console script. Exits with status 78 and an error if the extra is not installed."""
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        sys.stderr.write(f"The rsm command needs {' and '.join(missing)}: pip install 'rsm-engine[cli]'.\n")
        sys.exit(os.EX_CONFIG)
    from rsm.cli import main as run

    run()


if __name__ == "__main__":
    main()
