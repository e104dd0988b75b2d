"""A simulated engine."""

__all__: list[str] = []
