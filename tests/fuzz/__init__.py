"""Malformed input for everything that reads from Redis or HTTP; `make fuzz` runs it at length."""
