"""How good it is, and how that is known.

=============  ==========================================================================
predict.py     volumes in, label maps on the native grid out
metrics.py     scores of one mask, under a named convention for empty masks
tables.py      scores of many cases: CSV, mean and standard deviation
statistics.py  paired tests between two runs
figures.py     training curves, overlay sheet, block weights; each with its numbers in words
validation.py  the score that chooses the best epoch, on slices as they are trained
report.py      report.md: all of it, with what is needed to do it again
=============  ==========================================================================

Importing this package imports nothing else.
"""
