"""The acts of `rsm demo` and what they run on."""

__all__: list[str] = []
