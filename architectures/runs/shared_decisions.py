"""Questions that runs of several networks settle alike, and the fields of their recipes that need no row."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts.cohort_options import COHORT_OPTIONS
from trifuse.architectures.data.samples.augmentation_recipe import AugmentationRecipe
from trifuse.architectures.storage.best_epoch import LAST
from trifuse.architectures.storage.text import count
from trifuse.architectures.training.distributed import choose_device
from trifuse.architectures.training.precision import precision_on

from .decisions import NOT_SAID, OURS, Decision, shown
from .prepared_data import PreparedData

OWN_SPLIT, GIVEN_SPLIT = "the cohort's own", "given"
DRAWN_SPLIT = "drawn, 10 % validate, 20 % test"

NO_ROW = {
    **{option.field: "which files are the cohort: stated with the data" for option in COHORT_OPTIONS},
    "data.root": "a folder",
    "network.num_classes": "follows the cohort: stated with the data",
    "training.workers": "how fast samples are loaded",
    "training.checkpoint_every_steps": "how much an interruption costs",
    "training.device": "stated with the machine",
    "training.compile": "the same steps, rounded otherwise",
    "training.cuda_graph": "how fast a step is launched",
}
"""Fields of every recipe that change no result, or that a report states in another place, and why."""


def takes_adam(recipe: Any) -> bool:
    """Whether a run is trained by Adam or AdamW."""
    return recipe.training.optimizer != "sgd"


def takes_sgd(recipe: Any) -> bool:
    """Whether a run is trained by SGD."""
    return recipe.training.optimizer == "sgd"


def warms_up(recipe: Any) -> bool:
    """Whether a run's schedule is a warm-up and a cosine."""
    return recipe.training.schedule == "warmup_cosine"


def chooses_by_score(recipe: Any) -> bool:
    """Whether a score chooses the best epoch of a run, which else is the last."""
    return recipe.training.best_epoch_by != LAST


def takes_patches(recipe: Any) -> bool:
    """Whether a run sees slices patch by patch."""
    return recipe.data.preprocessing.patches is not None


def takes_whole_slices(recipe: Any) -> bool:
    """Whether a run sees whole slices."""
    return recipe.data.preprocessing.patches is None


def how_it_is_split(recipe: Any, data: PreparedData | None) -> str:
    """Return where a run's split comes from."""
    held_out = recipe.data.val_patients
    split = DRAWN_SPLIT if recipe.data.val_from == "all" else DRAWN_SPLIT.replace("10 %", "10 % of the rest")
    if recipe.data.split is not None or recipe.data.val_cases or recipe.data.test_cases:
        split = GIVEN_SPLIT
    elif data is not None and data.cohort.split is not None:
        split = OWN_SPLIT
    return split if held_out is None else f"{split}; {count(held_out, 'training patient')} held out to validate"


def how_slices_are_seen(recipe: Any, data: PreparedData | None) -> str:
    """Return whether slices are seen whole or patch by patch."""
    return "patches" if takes_patches(recipe) else "whole slices"


def augments(recipe: Any) -> bool:
    """Whether a run varies its training samples."""
    return recipe.data.augment != "none"


def how_strongly_it_augments(recipe: Any, data: PreparedData | None) -> str:
    """Return the strengths of a run's augmentation that are not those that it has by default."""
    given = recipe.data.augmentation.given
    return "; ".join(f"{name} {shown(value)}" for name, value in given.items()) or DEFAULT_STRENGTHS


def how_values_are_scaled(recipe: Any, data: PreparedData | None) -> str:
    """Return what becomes of a volume's values."""
    preprocessing = recipe.data.preprocessing
    clipped = preprocessing.window or preprocessing.clip_percentiles
    if clipped is None:
        return preprocessing.intensity
    unit = "" if preprocessing.clip_percentiles is None else " %"
    return f"{preprocessing.intensity}, {clipped[0]:g} to {clipped[1]:g}{unit}"


def how_dice_and_ce_add(recipe: Any, data: PreparedData | None) -> str:
    """Return what the loss of the segmentation is made of."""
    return f"Dice + cross-entropy, {recipe.lambda_dice:g} to {recipe.lambda_ce:g}"


def precision_of(recipe: Any, data: PreparedData | None) -> str:
    """Return the precision of the forward pass, of a run with what "auto" means on its device."""
    asked = recipe.training.precision
    if data is None or asked != "auto":
        return asked
    return f"auto ({precision_on(choose_device(recipe.training.device), asked)})"


def best_epoch_by(recipe: Any, data: PreparedData | None) -> str | None:
    """Return what chooses the best epoch of a run; where its recipe leaves that open, validation cases decide."""
    return recipe.training.settled(validates=data is None or data.validated_on == "val").best_epoch_by


def cases_that_choose(recipe: Any, data: PreparedData | None) -> str:
    """Return which cases choose the best epoch of a run."""
    return "validation" if data is None or data.validated_on == "val" else "training: none validate"


def where_it_starts(recipe: Any, data: PreparedData | None) -> str:
    """Return which weights a run starts from."""
    if recipe.training.init is None:
        return "drawn"
    return f"{Path(recipe.training.init).name}'s{', with another head' if recipe.training.reset_head else ''}"


LOSS = ("lambda_dice", "lambda_ce")
INTENSITY = tuple(f"data.preprocessing.{name}" for name in ("intensity", "window", "percentiles"))
DEFAULT_STRENGTHS = "as by default"
SPLIT = ("data.split", "data.val_cases", "data.test_cases", "data.val_from", "data.val_patients")
START = ("training.init", "training.reset_head")
SEEDS = ("training.seed", "network.init_seed", "data.split_seed")

SILENT = (
    Decision("Adam's betas", NOT_SAID, "training.betas", by="PyTorch", applies=takes_adam),
    Decision("SGD's momentum", NOT_SAID, "training.momentum", by=OURS, applies=takes_sgd),
    Decision("Warm-up, epochs", NOT_SAID, "training.warmup_epochs", by=OURS, applies=warms_up),
    Decision("Last learning rate", NOT_SAID, "training.min_lr", by=OURS, applies=warms_up),
    Decision("Largest gradient norm", NOT_SAID, "training.grad_clip", by=OURS),
    Decision("Best epoch by", NOT_SAID, "training.best_epoch_by", by=OURS, answer=best_epoch_by),
    Decision("Smoothing of that score", NOT_SAID, "training.best_epoch_smoothing", by=OURS, applies=chooses_by_score),
    Decision("Best epoch on", NOT_SAID, (), by=OURS, answer=cases_that_choose, applies=chooses_by_score),
    Decision("Moving average of weights", NOT_SAID, "training.ema_decay", by=OURS),
    Decision("Micro-batches per step", NOT_SAID, "training.accumulate", by=OURS),
    Decision("Precision", NOT_SAID, "training.precision", by=OURS, answer=precision_of),
    Decision("Rounding of float32 products on a GPU", NOT_SAID, "training.tf32", by=OURS),
    Decision("Starts from weights", NOT_SAID, START, by=OURS, answer=where_it_starts),
    Decision("Seeds", NOT_SAID, SEEDS, by=OURS),
    Decision("NaN and infinite voxels", NOT_SAID, "data.preprocessing.nonfinite", by=OURS),
)
"""What few papers speak of; a network whose paper does has a row of its own instead, see `silent_but`."""


def silent_but(*said: Decision) -> tuple[Decision, ...]:
    """Return rows of a network, and those of `SILENT` whose questions they leave open."""
    asked = {decision.question for decision in said}
    return (*said, *(decision for decision in SILENT if decision.question not in asked))


WHOLE_SLICES = (
    Decision("Slices are resized by", NOT_SAID, "data.preprocessing.resize", by=OURS, applies=takes_whole_slices),
    Decision("Predictions get back as", NOT_SAID, "data.preprocessing.restore", by=OURS, applies=takes_whole_slices),
)


def strength_row(by: str = "", *, paper_is_nnunet: bool = False) -> Decision:
    """Return the row on how strong an augmentation is, for a paper that is silent on it, or for nnU-Net's own."""
    return Decision(
        "Strength of the augmentation",
        "nnU-Net's" if paper_is_nnunet else NOT_SAID,
        tuple(f"data.augmentation.{field.name}" for field in fields(AugmentationRecipe)),
        (DEFAULT_STRENGTHS,),
        "" if paper_is_nnunet else by,
        how_strongly_it_augments,
        augments,
    )


_MEDIAN = "median of the training cases"
_NNUNET_PATCHES = (
    ("Patches per epoch", "samples_per_epoch", 3000),
    ("Patches centred on a class", "foreground", 1 / 3),
    ("Pixels of patches, mm", "spacing_mm", _MEDIAN),
    ("Step of windows, in patches", "step", 0.5),
    ("Mean over mirrored windows", "mirror", True),
)


def patch_rows(*, paper_is_nnunet: bool = False) -> tuple[Decision, ...]:
    """Return the rows on how patches are made, for a paper that is silent on it, or for nnU-Net's own."""
    return tuple(
        Decision(
            question,
            shown(value) if paper_is_nnunet else NOT_SAID,
            f"data.preprocessing.patches.{name}",
            (value,),
            "" if paper_is_nnunet else "nnU-Net",
            (lambda recipe, data: recipe.data.preprocessing.patches.spacing_mm or _MEDIAN)
            if value == _MEDIAN
            else None,
            takes_patches,
        )
        for question, name, value in _NNUNET_PATCHES
    )
