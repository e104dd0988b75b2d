"""Real vLLM, by itself, with every step written down: what steps cost, and who waits how long for whom."""
