"""Measurements of a worker's engine and calls."""

__all__: list[str] = []
