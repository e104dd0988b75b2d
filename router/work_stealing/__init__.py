"""Idle engines take waiting calls of loaded ones: the decision, and the loop that carries it out."""

__all__: list[str] = []
