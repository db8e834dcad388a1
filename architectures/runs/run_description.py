"""What a run is: in run.json, all of its recipe that resuming must not change; in a report, how it was trained."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trifuse.architectures.storage.config_json import config_to_json
from trifuse.architectures.training.compiled_forward import Compilation
from trifuse.architectures.training.distributed import choose_device
from trifuse.architectures.training.loop import FREE_TO_CHANGE as TRAINING_FREE_TO_CHANGE
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.training_state import read_position

FREE_TO_CHANGE = MappingProxyType({"free_to_change": True})  # metadata of a field that does not change the result


def describe_run(recipe: Any) -> dict[str, Any]:
    """Return what a resumed run must not change of a recipe, as JSON values.

    That is every field but ``training``, which `fit` describes itself, and those with `FREE_TO_CHANGE` as metadata.
    """
    free = {field.name for field in fields(recipe) if field.metadata.get("free_to_change")} | {"training"}
    return {name: value for name, value in config_to_json(recipe).items() if name not in free}


def describe_recipe(recipe: Any) -> dict[str, Any]:
    """Return a recipe as JSON values, as its device runs it, but for what does not change its training's result."""
    device = choose_device(recipe.training.device)
    description = config_to_json(replace(recipe, training=recipe.training.on(device)))
    kept = {name: value for name, value in description["training"].items() if name not in TRAINING_FREE_TO_CHANGE}
    return {**description, "training": kept}


def compilation_of(run: Path) -> Compilation | None:
    """Return what of a run's steps was compiled; None where nothing was to be.

    Raises:
        CheckpointError: the run has no checkpoint, or a damaged one.
    """
    return read_position(run / "last").compilation


def describe_compilation(run: Path) -> dict[str, str]:
    """Return the fact of a report on what of a run's steps was compiled; none where nothing was to be."""
    found = compilation_of(run)
    return {} if found is None else {"Forward pass": found.describe()}


def describe_training(recipe: Recipe) -> dict[str, str]:
    """Return the facts of a report on how a network was trained, for one without a table of decisions."""
    momenta = (
        f"momentum {recipe.momentum:g}" if recipe.optimizer == "sgd" else "betas {:g} and {:g}".format(*recipe.betas)
    )
    schedule = {
        "warmup_cosine": f"warm-up over {recipe.warmup_epochs:g} epochs, then cosine to {recipe.min_lr:g}",
        "poly": "polynomial",
        "constant": "constant",
    }[recipe.schedule]
    return {
        "Optimiser": f"{recipe.optimizer}, {momenta}, weight decay {recipe.weight_decay:g}",
        "Learning rate": f"{recipe.lr:g}",
        "Schedule": f"{schedule}; {recipe.epochs} epochs",
        "Batch size": f"{recipe.batch_size}",
    }
