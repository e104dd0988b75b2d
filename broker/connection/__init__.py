"""Connections to Redis: how the master is found, what passes for a blip, and how scripts are sent."""

__all__: list[str] = []
