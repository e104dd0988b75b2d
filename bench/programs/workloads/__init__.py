"""The paper's workloads, and two real ones."""
