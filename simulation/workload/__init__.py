"""Workloads: programs, and their sources."""

__all__: list[str] = []
