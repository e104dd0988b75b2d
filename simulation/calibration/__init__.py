"""The steps of a real engine, measured and fitted."""

__all__: list[str] = []
