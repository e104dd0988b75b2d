"""The story of `rsm demo`."""

__all__: list[str] = []
