"""Cohorts: one file per layout of a folder, and what all layouts share."""
