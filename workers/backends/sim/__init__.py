"""A modelled engine."""

__all__: list[str] = []
