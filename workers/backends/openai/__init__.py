"""A remote OpenAI-compatible server as an engine."""

__all__: list[str] = []
