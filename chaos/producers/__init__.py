"""Producer processes of three kinds, and their plans."""
