"""A reference model of docs/protocol.md in plain Python."""
