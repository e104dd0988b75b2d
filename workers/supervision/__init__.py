"""Supervision of workers, on this host and on others."""

__all__: list[str] = []
