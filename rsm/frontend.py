"""The Autellix paper's frontend: programs begin and end here, and their process table is read here."""

from __future__ import annotations

from rsm.engine import GlobalProcessTable, SessionManager

__all__ = ["GlobalProcessTable", "SessionManager"]
