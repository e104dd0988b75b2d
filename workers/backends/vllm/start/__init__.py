"""What it takes to start vLLM: arguments, GPUs, a model to try it with, and the cause where it fails."""

__all__: list[str] = []
