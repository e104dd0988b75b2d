"""Work stealing: idle engines take waiting calls of loaded ones. The decision, and the loop that applies it."""

__all__: list[str] = []
