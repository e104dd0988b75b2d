"""The Lua of the scripts, linted and run without Redis."""
