"""Programs, not calls: workloads, systems and metrics in virtual time (docs/scheduling.md)."""
