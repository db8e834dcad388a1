"""Whole networks, and how to train and judge them.

==============  ====================================================================
dino_unet/      frozen DINOv2 + weighted block fusion + U-Net decoder (left atrium)
data/           files -> cases -> samples: NIfTI, data-set layouts, phantoms
training/       the one loop, losses, schedules, checkpoints, distributed
evaluation/     volume inference, metrics, statistics, figures, report
cli.py          the ``trifuse`` command: parses, then hands over
==============  ====================================================================

Importing this package imports nothing else: take what you need from the folder that holds it.
"""
