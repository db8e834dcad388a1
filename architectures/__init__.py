"""Whole networks, and how to train and judge them.

=============  ==============================================================================
dino_unet/     frozen DINOv2, weighted block fusion, U-Net decoder: left atrium
fias/          DilateFormer, multi-kernel convolutions, MixAtt: organs and the heart
taff_unet/     LGE, an ECG, the days between, and the AHA-17 atlas: myocardial scar
plain_unet/    the U-Net that nnU-Net plans, the others' baseline
data/          files to cases to samples: volumes, layouts, splits, ECGs, phantoms
training/      the one loop, losses, schedules, checkpoints, several processes
evaluation/    volume inference, metrics, statistics, figures, reports
runs/          a run from a cohort to a report, and the registry of networks
storage/       what lies on disk: weights, configurations, files never half written
cli/           the ``trifuse`` command, one file per command
=============  ==============================================================================

Each network's package exports its network, its configuration, and one ``EXPERIMENT``: all that the rest asks of it.
Importing this package imports nothing else: take what you need from the folder that holds it.
"""
