"""What operators and networks are compared with."""
