"""No-op calls through rsm-engine and through its peers; what the broker itself costs."""
