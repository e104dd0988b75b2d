"""The frontend of the Autellix paper: starts and ends programs, and reads their process table."""

from __future__ import annotations

from rsm.engine import GlobalProcessTable, SessionManager

__all__ = ["GlobalProcessTable", "SessionManager"]
