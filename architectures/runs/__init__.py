"""A run, from a cohort to a report: recipes, the pipeline, the run folder, and what is done with finished runs."""
