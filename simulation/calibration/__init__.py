"""Measures the steps of a real engine and fits their costs."""

__all__: list[str] = []
