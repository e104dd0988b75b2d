"""Starting vLLM: arguments, GPUs, a tiny test model, and the cause of a failed start."""

__all__: list[str] = []
