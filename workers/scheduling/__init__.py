"""Program-aware scheduling inside an engine: the rules, what calls cost, and the plug-in for vLLM."""

__all__: list[str] = []
