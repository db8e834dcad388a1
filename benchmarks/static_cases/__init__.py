"""What is compiled ahead of time for each operator, and the traffic that each pass declares."""
