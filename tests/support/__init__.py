"""Shared test support: worlds, workers, servers and models."""
