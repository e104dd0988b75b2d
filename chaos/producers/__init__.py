"""Producers as processes, of three kinds, and what they are going to do."""
