"""The commands. Each module has one, or a few that belong together."""

__all__: list[str] = []
