"""Lints and runs the scripts' Lua without Redis."""
