"""Benchmarks of whole programs: workloads, systems and metrics in virtual time (docs/scheduling.md)."""
