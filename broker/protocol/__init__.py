"""The contract with Redis: keys, ids, records, messages, and every state change as a Lua script."""

__all__: list[str] = []
