"""Chaos tests: the whole system under load while processes, Redis, its disk and its connections fail.

`python -m chaos` draws the faults from a seed, keeps a ledger outside Redis, and gives a verdict (docs/conformance.md).
"""
