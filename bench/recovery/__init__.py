"""Measures the cost of failures: recovery times, streams whose engine dies, and a soak."""
