"""CPU paths that are too long for the file of their operator."""
