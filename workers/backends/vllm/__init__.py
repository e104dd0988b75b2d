"""vLLM in this process."""

__all__: list[str] = []
