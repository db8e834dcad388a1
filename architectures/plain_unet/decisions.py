"""What nnU-Net, its publication and its code, does in a run, and what is decided beside it."""

from __future__ import annotations

from trifuse.architectures.runs import shared_decisions as shared
from trifuse.architectures.runs.decisions import OURS, Decision
from trifuse.architectures.runs.nnunet_recipe import VAL_DICE_EMA

_LOSS = "Dice + cross-entropy, 1 to 1"

_TRAINING = shared.silent_but(
    Decision("Optimiser", "SGD with Nesterov", "training.optimizer", ("sgd",)),
    Decision("SGD's momentum", "0.99", "training.momentum", (0.99,), applies=shared.takes_sgd),
    Decision("Learning rate", "0.01", "training.lr", (1e-2,)),
    Decision("Weight decay", "3e-05", "training.weight_decay", (3e-5,)),
    Decision("Schedule", "poly, power 0.9", "training.schedule", ("poly",)),
    Decision("Largest gradient norm", "12", "training.grad_clip", (12.0,)),
    Decision("Epochs", "1000", "training.epochs", (1000,)),
    Decision("Batch size", "as planned, 12", "training.batch_size", (12,)),
    Decision("Loss, at each resolution", _LOSS, shared.LOSS, (_LOSS,), answer=shared.how_dice_and_ce_add),
    Decision("Dice over the whole batch", "yes, in 2D", "batch_dice", (True,)),
    Decision("Best epoch by", "Dice", "training.best_epoch_by", ("val_dice",), answer=shared.best_epoch_by),
    Decision(
        "Smoothing of that score",
        f"{VAL_DICE_EMA:g}",
        "training.best_epoch_smoothing",
        (VAL_DICE_EMA,),
        applies=shared.chooses_by_score,
    ),
    Decision(
        "Best epoch on",
        "validation",
        (),
        ("validation",),
        answer=shared.cases_that_choose,
        applies=shared.chooses_by_score,
    ),
)

_DATA = (
    Decision("Split", "five folds", shared.SPLIT, by=OURS, answer=shared.how_it_is_split),
    Decision("Side of a patch, pixels", "as planned, 256", "data.preprocessing.image_size", (256,)),
    Decision("Slices are seen", "as patches", (), ("patches",), answer=shared.how_slices_are_seen),
    *shared.patch_rows(paper_is_nnunet=True),
    Decision("Slices to train on", "all", "data.slices", ("all",)),
    Decision("Augmentation", "nnU-Net's", "data.augment", ("nnunet",)),
    shared.strength_row(paper_is_nnunet=True),
    Decision("Intensities", "zscore", shared.INTENSITY, ("zscore",), answer=shared.how_values_are_scaled),
    *shared.WHOLE_SLICES,
    Decision(
        "Channels of an image", "one per modality", ("data.preprocessing.channels", "network.in_channels"), by=OURS
    ),
)

_NETWORK = (
    Decision("Channels of the first stage", "32", "network.base_dim", (32,)),
    Decision("Most channels of a stage", "512", "network.max_dim", (512,)),
    Decision(
        "Stages",
        "halved while a side is 8 or more",
        "network.num_stages",
        by=OURS,
        answer=lambda recipe, data: len(recipe.network.features),
    ),
)

DECISIONS = (*_TRAINING, *_DATA, *_NETWORK)
NO_ROW = {**shared.NO_ROW, "network.image_size": "that of the data"}
