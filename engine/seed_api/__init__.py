"""The classes of the project's original interface, as views of the data in Redis."""

__all__: list[str] = []
