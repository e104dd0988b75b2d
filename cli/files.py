"""Files that a command reads and writes, with error messages for users."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rsm.broker import InvalidRequest


def read_text(path: str, what: str) -> str:
    """The text of a file, or of stdin for "-". `what` names it in the error message.

    Raises:
        InvalidRequest: it cannot be read.
    """
    where = "on standard input" if path == "-" else path
    try:
        return (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8")
    except OSError as e:
        raise InvalidRequest(f"{what} {where} cannot be read: {e.strerror}.") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"{what} {where} cannot be read: it is not text in UTF-8.") from None


def require_writable(path: Path, what: str) -> None:
    """Checks a file that is written only at the end of long work.

    Raises:
        InvalidRequest: it cannot be written.
    """
    folder = path.parent
    if path.is_dir():
        why = "it is a folder"
    elif not folder.is_dir():
        why = f"there is no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        why = "permission denied"
    else:
        return
    raise InvalidRequest(f"{what} cannot be written to {path}: {why}.")
