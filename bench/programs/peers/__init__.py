"""Compares public routers with ours on the same programs."""
