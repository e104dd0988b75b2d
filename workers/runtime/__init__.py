"""A worker at work: one event loop and four threads."""

__all__: list[str] = []
