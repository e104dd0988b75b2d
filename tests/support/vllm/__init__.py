"""vLLM, whole and in parts, for tests."""
