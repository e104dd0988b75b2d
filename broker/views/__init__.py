"""What people and dashboards see of a namespace. Reads, and the replay of dead letters."""

__all__: list[str] = []
