"""What a worker measures of its engine and of its calls."""

__all__: list[str] = []
