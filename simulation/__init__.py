"""Simulation of fleets in virtual time, with the real code of the router's policies and the schedulers."""

__all__: list[str] = []
