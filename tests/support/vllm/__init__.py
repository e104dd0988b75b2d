"""Test support for vLLM: whole engines and single classes."""
