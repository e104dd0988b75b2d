"""Classes of the project's first interface, as views of what Redis holds."""

__all__: list[str] = []
