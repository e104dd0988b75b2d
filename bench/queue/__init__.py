"""Measures the broker's own cost: no-op calls through rsm-engine and through its peers."""
