"""The worker's runtime: one event loop and four threads."""

__all__: list[str] = []
