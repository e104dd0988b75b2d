"""What keeps workers running, on this host and on others."""

__all__: list[str] = []
