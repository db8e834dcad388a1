"""What the paper on TAFF-UNet says of a run, and what is decided where it is silent."""

from __future__ import annotations

from typing import Any

from trifuse.architectures.data.layouts.lge_ecg import MAX_INTERVAL_DAYS
from trifuse.architectures.runs import shared_decisions as shared
from trifuse.architectures.runs.decisions import NOT_SAID, OURS, Decision
from trifuse.architectures.runs.prepared_data import PreparedData
from trifuse.blocks.temporal_aware_fusion import BY_SEGMENT

_NNUNET, _UPSTREAM = "nnU-Net", "its autoencoder"


def _takes_prior(recipe: Any) -> bool:
    return recipe.network.takes_prior


def _predicts_prior(recipe: Any) -> bool:
    return recipe.network.takes_prior and recipe.prior.source == "predicted"


def _takes_ecg(recipe: Any) -> bool:
    return recipe.network.takes_ecg


def _takes_time(recipe: Any) -> bool:
    return recipe.network.takes_time


def _time_in_gate(recipe: Any, data: PreparedData | None) -> str:
    return recipe.network.fusion_gate_time


def _has_grid(recipe: Any) -> bool:
    return recipe.network.takes_ecg and recipe.network.fusion_projection == "grid"


def _follows_segments(recipe: Any) -> bool:
    return recipe.network.takes_ecg and recipe.network.fusion_projection in BY_SEGMENT


def _prior_source(recipe: Any, data: PreparedData | None) -> str:
    prior = recipe.prior
    source = {"gt": "reference annotation", "predicted": "a first pass"}.get(prior.source, "to be chosen")
    return source if prior.labels is None else f"{source}, given label maps"


def _autoencoder_weights(recipe: Any, data: PreparedData | None) -> str:
    return "random" if recipe.network.ecg_checkpoint is None else "pretrained"


_TRAINING = shared.silent_but(
    Decision("Optimiser of the image part", "SGD", "training.optimizer", ("sgd",)),
    Decision("SGD's momentum", "0.99", "training.momentum", (0.99,), applies=shared.takes_sgd),
    Decision("Learning rate", "0.01", "training.lr", (1e-2,)),
    Decision("Weight decay", "3e-05", "training.weight_decay", (3e-5,)),
    Decision("Schedule", "poly, power 0.9", "training.schedule", ("poly",)),
    Decision("Largest gradient norm", NOT_SAID, "training.grad_clip", by=_NNUNET),
    Decision("Epochs", NOT_SAID, "training.epochs", by=_NNUNET),
    Decision("Batch size", NOT_SAID, "training.batch_size", by=_NNUNET),
    Decision("ECG: AdamW's learning rate", NOT_SAID, "parts.ecg_lr", by=OURS, applies=_takes_ecg),
    Decision("ECG: weight decay", "5e-05", "parts.ecg_weight_decay", (5e-5,), applies=_takes_ecg),
    Decision("Fusion: AdamW's learning rate", NOT_SAID, "parts.fusion_lr", by=OURS, applies=_takes_ecg),
    Decision("Fusion: weight decay", "0.0001", "parts.fusion_weight_decay", (1e-4,), applies=_takes_ecg),
    Decision(
        "Fusion: schedule",
        "synchronised",
        (),
        by=OURS,
        answer=lambda recipe, data: f"{recipe.training.schedule}, as the image's",
        applies=_takes_ecg,
    ),
    Decision(
        "Loss, deeply supervised", "Dice + cross-entropy", shared.LOSS, by=_NNUNET, answer=shared.how_dice_and_ce_add
    ),
    Decision("Dice over the whole batch", NOT_SAID, "batch_dice", by=_NNUNET),
    Decision("ECG: weight of reconstruction", NOT_SAID, "lambda_ecg", by=OURS, applies=_takes_ecg),
    Decision("ECG: its quadratic rise, epochs", "the first few", "ecg_warmup_epochs", by=OURS, applies=_takes_ecg),
    Decision("ECG: padding is left out", NOT_SAID, "mask_padding", by=_UPSTREAM, applies=_takes_ecg),
    Decision("Gate: weight of its entropy", "0.003", "lambda_entropy", (3e-3,), applies=_takes_ecg),
    Decision(
        "Gate: sign of the entropy",
        "added, against collapse",
        "entropy_sign",
        ("literal",),
        OURS,
        applies=_takes_ecg,
    ),
    Decision("Best epoch by", NOT_SAID, "training.best_epoch_by", by=_NNUNET, answer=shared.best_epoch_by),
    Decision(
        "Smoothing of that score",
        NOT_SAID,
        "training.best_epoch_smoothing",
        by=_NNUNET,
        applies=shared.chooses_by_score,
    ),
)

_DATA = (
    Decision("Split", "7 : 1 : 2", shared.SPLIT, by=OURS, answer=shared.how_it_is_split),
    Decision("Side of a patch, pixels", NOT_SAID, "data.preprocessing.image_size", by=_NNUNET),
    Decision("Slices are seen", NOT_SAID, (), by=_NNUNET, answer=shared.how_slices_are_seen),
    *shared.patch_rows(),
    Decision("Slices to train on", NOT_SAID, "data.slices", by=_NNUNET),
    Decision("Augmentation", NOT_SAID, "data.augment", by=_NNUNET),
    shared.strength_row(_NNUNET),
    Decision("Intensities", NOT_SAID, shared.INTENSITY, by=_NNUNET, answer=shared.how_values_are_scaled),
    *shared.WHOLE_SLICES,
    Decision("Channels of an image", "1", "data.preprocessing.channels", (1,)),
    Decision(
        "Longest interval, days",
        "90",
        "data.max_interval_days",
        (MAX_INTERVAL_DAYS,),
        answer=lambda recipe, data: recipe.data.max_interval_days or MAX_INTERVAL_DAYS,
        applies=_takes_ecg,
    ),
    Decision("Autoencoder: leads scaled by", NOT_SAID, "network.ecg.lead_scaling", by=_UPSTREAM, applies=_takes_ecg),
    Decision("Fewest beats of a median beat", NOT_SAID, "ecg.min_beats", by=OURS, applies=_takes_ecg),
    Decision("ECG without a median beat", NOT_SAID, "ecg.unusable", by=OURS, applies=_takes_ecg),
)

_PRIOR = (
    Decision(
        "Prior: comes from",
        NOT_SAID,
        ("prior.source", "prior.labels"),
        ("reference annotation", "a first pass"),
        "yours to make",
        answer=_prior_source,
        applies=_takes_prior,
    ),
    Decision("Prior: folds of first pass", NOT_SAID, "prior.folds", by=OURS, applies=_predicts_prior),
    Decision("Prior: epochs of first pass", NOT_SAID, "prior.first_pass_epochs", by=OURS, applies=_predicts_prior),
    Decision("Prior: angles start at", NOT_SAID, ("prior.reference", "prior.angle_deg"), by=OURS, applies=_takes_prior),
    Decision("Prior: centre of", NOT_SAID, "prior.centre", by=OURS, applies=_takes_prior),
    Decision("Prior: always an apex", NOT_SAID, "prior.force_last", by=OURS, applies=_takes_prior),
    Decision("Prior: table of arteries", NOT_SAID, "prior.arteries", by=OURS, applies=_takes_prior),
)

_NETWORK = (
    Decision("Inputs", "full: prior, ECG, time", "network.setting", ("full",)),
    Decision("Channels of the first stage", NOT_SAID, "network.base_dim", by=_NNUNET),
    Decision("Most channels of a stage", NOT_SAID, "network.max_dim", by=_NNUNET),
    Decision("Stage of the fusion, from 0", "mid-level", "network.fusion_stage", by=OURS, applies=_takes_ecg),
    Decision("Skip of that stage", "fused map, to both paths", "network.skip", ("fused",), OURS, applies=_takes_ecg),
    Decision(
        "ECG becomes a map by",
        "a projection to a map",
        "network.projection",
        ("segments", "segments_full", "grid"),
        OURS,
        lambda recipe, data: recipe.network.fusion_projection,
        _takes_ecg,
    ),
    Decision("Side of the grid", NOT_SAID, "network.grid_side", by=OURS, applies=_has_grid),
    Decision("Grid follows the image", NOT_SAID, "network.grid_follows_image", by=OURS, applies=_has_grid),
    Decision("Segments of the map", NOT_SAID, "network.segment_masks", by=OURS, applies=_follows_segments),
    Decision(
        "Rectifier behind the fusion",
        NOT_SAID,
        "network.rectify",
        by=OURS,
        answer=lambda recipe, data: recipe.network.rectifies,
        applies=_takes_ecg,
    ),
    Decision("Projection starts at zero", NOT_SAID, "network.zero_init_proj", by=OURS, applies=_takes_ecg),
    Decision("Gate: sees the image", NOT_SAID, "network.gate", by=OURS, applies=_takes_ecg),
    Decision("Gate: sees the time", NOT_SAID, "network.gate_time", by=OURS, answer=_time_in_gate, applies=_takes_time),
    Decision("Gate: hidden units", NOT_SAID, "network.gate_width", by=OURS, applies=_takes_ecg),
    Decision("FiLM: hidden units", NOT_SAID, "network.film_width", by=OURS, applies=_takes_time),
    Decision("Interval of 1, days", "scaled to 0 to 1", "network.max_days", by=OURS, applies=_takes_time),
    Decision(
        "Segmentation trains the ECG",
        NOT_SAID,
        "network.detach_z",
        by=OURS,
        answer=lambda recipe, data: not recipe.network.detach_z,
        applies=_takes_ecg,
    ),
    Decision(
        "Autoencoder: weights",
        "pretrained on PTB-XL",
        "network.ecg_checkpoint",
        ("pretrained",),
        answer=_autoencoder_weights,
        applies=_takes_ecg,
    ),
    Decision("Autoencoder: code", "64", "network.ecg.z_dim", (64,), applies=_takes_ecg),
    Decision("Autoencoder: lead layout", NOT_SAID, "network.ecg.lead_layout", by=OURS, applies=_takes_ecg),
    Decision(
        "Autoencoder: last linear layer",
        NOT_SAID,
        ("network.ecg.final_linear", "network.ecg.pooled_dim"),
        by=_UPSTREAM,
        applies=_takes_ecg,
    ),
    Decision("Autoencoder: samples of a beat", NOT_SAID, "network.ecg.time_steps", by=OURS, applies=_takes_ecg),
    Decision("Autoencoder: features of a lead", NOT_SAID, "network.ecg.base_dim", by=_UPSTREAM, applies=_takes_ecg),
    Decision("Autoencoder: halvings of time", NOT_SAID, "network.ecg.downsample", by=_UPSTREAM, applies=_takes_ecg),
    Decision(
        "Autoencoder: dropout",
        NOT_SAID,
        ("network.ecg.dropout", "network.ecg.batchwise_dropout"),
        by=_UPSTREAM,
        applies=_takes_ecg,
    ),
    Decision("Autoencoder: seed", NOT_SAID, "network.ecg.init_seed", by=OURS, applies=_takes_ecg),
)

DECISIONS = (*_TRAINING, *_DATA, *_PRIOR, *_NETWORK)
NO_ROW = {
    **{name: reason for name, reason in shared.NO_ROW.items() if name != "data.max_interval_days"},
    "network.image_size": "that of the data",
    "strict": "refuses a run, and changes none",
}
