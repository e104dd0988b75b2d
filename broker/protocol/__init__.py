"""The contract with Redis: keys, ids, records, messages, and a Lua script for every state change."""

__all__: list[str] = []
