"""Predictions, their scores, the statistics of scores, and the figures and report that show them.

===================  ===============================================================================
predict.py           volumes in, label maps on the native grid out
metrics.py           scores of one mask, under a named convention for empty masks
scoring.py           a folder of predictions -> one scored row per case and class, failures included
label_folders.py     the same of two plain folders of label maps, which must fit each other
summary.py           many rows -> mean and standard deviation, in numbers and in words
tables.py            rows and summaries as CSV, read back with suspicion
intervals.py         summaries with the bootstrap interval of each mean, by patient
statistics.py        paired tests between two runs
protocols.py         a publication's scores beside the strict ones, and which rules differ
readouts.py          volumes in mL, masses in g, the scar's share of the wall in %
bland_altman.py      whether predicted volumes agree with the true ones
picture.py           a PNG, its numbers and its sentence: what all pictures share
charts.py            training curves and block weights, drawn from the log
interval_figures.py  Dice, and the gate's weight of the ECG, by days between ECG and MRI
overlays.py          slices of the worst to the best cases, prediction beside truth
report.py            report.md: all of it, with what is needed to do it again
===================  ===============================================================================

Importing this package imports nothing else.
"""
