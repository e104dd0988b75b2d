"""Views of a namespace for people and dashboards, and the replay of dead letters."""

__all__: list[str] = []
