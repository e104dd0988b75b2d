"""The commands, one module each or a few that belong together."""

__all__: list[str] = []
