"""The clients that producers use: sync, asyncio, and sharded over several namespaces. `rsm.broker` exports them."""

__all__: list[str] = []
