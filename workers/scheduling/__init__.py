"""Program-aware scheduling inside an engine: the rules, the service units, and the plug-in for vLLM."""

__all__: list[str] = []
