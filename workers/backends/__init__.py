"""Engines behind one interface: vLLM, a remote server, a simulation."""

__all__: list[str] = []
