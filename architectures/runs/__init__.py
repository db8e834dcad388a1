"""A run, from a cohort to a report, and what is done with finished ones.

====================  =======================================================================
experiment.py         what each network registers for the rest of the package
registry.py           which networks there are
options.py            an option of the command that sets a field of a recipe
recipes.py            what a run is to do; nnunet_recipe.py: as nnU-Net does it
pipeline.py           one run: ``train``
prepared_data.py      its cohort, split and samples
folder.py             its folder: names of files, and who may write there
run_description.py    what a resumed run must not change
report.py             predictions, scores and pictures of a finished run
predict.py            a finished network on new images
overlay.py            several runs in one picture
repeats.py            one recipe with several seeds; repeats_report.py: their report
ablation.py           a paper's table, row by row
demonstration.py      what demos share
parallel.py           several computations at a time
====================  =======================================================================

Importing this package imports nothing else.
"""
