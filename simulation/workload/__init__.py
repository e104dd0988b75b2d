"""What programs look like, and where they come from."""

__all__: list[str] = []
