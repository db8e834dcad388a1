"""The operators: one file each, with its equation, reference, CPU path and registration."""
