"""Phantoms: synthetic cohorts with known anatomy."""
