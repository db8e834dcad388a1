"""Every operator and network against its peers: one file each, one harness, one report (`report.py`)."""
