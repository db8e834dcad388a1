"""Reports: every benchmark in one run, and the tables made from result files."""
