"""The one training loop, and what it is made of.

=======================  ===========================================================================
recipe.py                how to train: every number with its unit, checked when it is written down
loop.py                  ``fit``: from batch to log line
batches.py               which samples, in which order, on which rank: a function of the seed alone
losses.py                Dice and cross-entropy over all ranks
scar_losses.py           what TAFF-UNet adds to them: ECGs and its gate
parameter_groups.py      one optimiser per group of parameters
schedules.py             learning rate as a function of the step
ema.py                   moving average of the weights
step.py                  one optimiser step: from a batch to changed weights
compiled_forward.py      its forward and backward pass, compiled
recorded_step.py         the whole step as CUDA graphs
validation.py            the score by which the best epoch is chosen
training_state.py        what is saved so that a run continues as if it had never stopped
checkpoint.py            folders that always hold one whole checkpoint, and the saving of them
run_folder.py            the output folder: one run, one process at a time, one configuration
progress.py              what a person sees meanwhile
signals.py               stop at the next step when a signal asks for it, resumable
crash.py                 what to know about a loss that is not finite
distributed.py           several processes as one
feature_cache.py         the frozen encoder's features, computed once
=======================  ===========================================================================
"""
