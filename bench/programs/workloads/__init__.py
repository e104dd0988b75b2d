"""The paper's workloads, and two from real traces."""
