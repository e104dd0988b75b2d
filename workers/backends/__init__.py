"""Engines behind one interface: vLLM, a remote server, a modelled engine."""

__all__: list[str] = []
