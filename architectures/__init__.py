"""Whole networks, and how to train and judge them.

=============  =========================================================================
dino_unet/     frozen DINOv2 + weighted block fusion + U-Net decoder (left atrium)
fias/          DilateFormer + multi-kernel convolutions, MixAtt (multi-organ, cardiac)
data/          files -> cases -> samples: NIfTI, data-set layouts, splits, phantoms
training/      the one loop, losses, schedules, checkpoints, several processes
evaluation/    volume inference, metrics, statistics, figures, report
cli.py         the ``trifuse`` command; words.py: its words; commands.py and
               train_commands.py: what each of them does
recipes.py     what a run is to do; run.py: one run, from a cohort to a report
networks.py    a finished network, by its folder
pretrained.py  weights and configurations on disk: weights_file.py, config_json.py;
               published_weights.py: those that others have published
files.py       files that are never half written
doctor.py      what is installed, and which backend each operator uses
complexity.py  what a network costs: parameters and operations
=============  =========================================================================

Importing this package imports nothing else: take what you need from the folder that holds it.
"""
