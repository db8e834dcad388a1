"""Samples: slices and patches that networks train on, and how they are prepared."""
