"""Benchmarks of real vLLM without the broker, with a log of every step: the cost of steps, and waiting times."""
