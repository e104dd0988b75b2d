"""What docs/protocol.md promises, as plain Python."""
