"""Learning rate as a pure function of where a run is, so that resuming cannot get it wrong."""

from __future__ import annotations

import math

from .recipe import Recipe, Schedule


def poly(epoch: int, epochs: int, lr: float, power: float = 0.9) -> float:
    """Return ``lr * (1 - epoch / epochs) ** power`` for the 0-based ``epoch``.

    Source: nnU-Net (Isensee et al., Nature Methods 2021), which steps it once per epoch.
    """
    return lr * (1 - epoch / epochs) ** power


def warmup_cosine(step: int, steps: int, warmup_steps: int, lr: float, min_lr: float = 0.0) -> float:
    """Rise linearly to ``lr`` within ``warmup_steps``, then fall along half a cosine to ``min_lr`` at ``steps``.

    Args:
        step: 0-based; the first one already learns, with ``lr / warmup_steps``.
        steps: of the whole run.
        warmup_steps: 0 for none.
        lr: the highest learning rate.
        min_lr: the last one.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017, Eq. 5, without restarts.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def constant(lr: float) -> float:
    """Return ``lr``."""
    return lr


def learning_rate(schedule: Schedule, recipe: Recipe, *, lr: float, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of the 0-based ``step`` of a run, for a group whose highest one is ``lr``."""
    if schedule == "poly":
        return poly(step // steps_per_epoch, recipe.epochs, lr)
    if schedule == "warmup_cosine":
        warmup_steps = round(recipe.warmup_epochs * steps_per_epoch)
        return warmup_cosine(step, recipe.epochs * steps_per_epoch, warmup_steps, lr, recipe.min_lr * lr / recipe.lr)
    return constant(lr)
