"""Fleets in virtual time: the router's own policies and the schedulers' own code, under a clock that jumps."""

__all__: list[str] = []
