"""What producers use: with threads, with asyncio, over several namespaces. `rsm.broker` exports the names."""

__all__: list[str] = []
