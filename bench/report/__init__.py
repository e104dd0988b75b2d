"""Writes tables and pages of results."""
