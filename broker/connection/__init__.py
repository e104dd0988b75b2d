"""Connections to Redis: finding the master, retrying, and sending scripts."""

__all__: list[str] = []
