"""vLLM in the worker's process."""

__all__: list[str] = []
