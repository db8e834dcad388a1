"""How TAFF-UNet is trained: its recipe, its loss, and what cases bring beside their images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trifuse.architectures.data.ecg.wfdb_header import require_reader
from trifuse.architectures.data.layouts.cohort import Cohort, Split
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.runs.folder import FIRST_PASS_FOLDER, run_section
from trifuse.architectures.runs.nnunet_recipe import nnunet_data, nnunet_training, with_smoothed_dice
from trifuse.architectures.runs.prepared_data import PreparedData
from trifuse.architectures.runs.recipes import DataRecipe, RecipeError
from trifuse.architectures.training.distributed import open_world
from trifuse.architectures.training.losses import SegmentationLoss, check_weights
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.scar_losses import ScarLoss
from trifuse.architectures.training.step import side_inputs_of
from trifuse.kernels import DataError

from .config import TaffUNetConfig
from .first_pass import first_pass, predict_first_pass
from .inputs import ORACLE, EcgInputRecipe, PriorRecipe, case_side_inputs, describe_inputs, require_choice
from .model import TaffOutput, TaffUNet, check_autoencoder
from .optimisation import PartsRecipe, taff_param_groups
from .report import Heard, cases_with_ecg, describe_gate, draw_pictures, hear


@dataclass(frozen=True)
class TaffUNetRecipe:
    """A run of TAFF-UNet; the defaults are the paper's where it speaks, and nnU-Net's where it does not.

    Attributes:
        data: which cases, and how their slices are prepared.
        network: the network; its number of classes follows the cohort, its image size the data.
        training: how the image's part is trained,
        parts: and how the ECG's and the fusion's differ.
        prior: where the AHA-17 prior comes from, for settings with one.
        ecg: how ECGs become inputs, for settings with one.
        batch_dice: whether the Dice of the segmentation pools its sums over the batch.
        lambda_dice: weight of that Dice,
        lambda_ce: and of the cross-entropy.
        lambda_ecg: weight of the reconstruction of the ECG, reached quadratically after
        ecg_warmup_epochs: epochs.
        mask_padding: whether the zeros around a beat are left out of it.
        lambda_entropy: weight of the entropy of the fusion's gate,
        entropy_sign: which is to be large (``"maximise"``), or added as the paper writes it (``"literal"``).
        strict: refuse an oracle prior.

    The first pass of a predicted prior has the plain U-Net's own loss.

    Raises:
        ValueError: data that do not fit the network, or a weight or the warm-up of the loss that is negative; or the
            weights of the segmentation are all zero.
    """

    data: DataRecipe = field(default_factory=nnunet_data)
    network: TaffUNetConfig = field(default_factory=TaffUNetConfig)
    training: Recipe = field(default_factory=nnunet_training)
    parts: PartsRecipe = field(default_factory=PartsRecipe)
    prior: PriorRecipe = field(default_factory=PriorRecipe)
    ecg: EcgInputRecipe = field(default_factory=EcgInputRecipe)
    batch_dice: bool = True
    lambda_dice: float = 1.0
    lambda_ce: float = 1.0
    lambda_ecg: float = 1.0
    ecg_warmup_epochs: float = 10.0
    mask_padding: bool = False
    lambda_entropy: float = 3e-3
    entropy_sign: Literal["maximise", "literal"] = "maximise"
    strict: bool = False

    def __post_init__(self) -> None:
        check_weights(lambda_dice=self.lambda_dice, lambda_ce=self.lambda_ce)
        if not 0 <= self.ecg_warmup_epochs < math.inf:
            raise ValueError(f"ecg_warmup_epochs must be a finite number, 0 or more, got {self.ecg_warmup_epochs}")
        _loss(self)  # which checks the other weights
        if self.data.preprocessing.patches is None:
            raise ValueError("data.preprocessing.patches: this network is trained on patches; do not set it to null")
        if self.data.preprocessing.channels != 1:
            raise ValueError(f"data.preprocessing.channels must be 1, got {self.data.preprocessing.channels}")
        object.__setattr__(self, "network", replace(self.network, image_size=self.data.preprocessing.image_size))

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did: nnU-Net's loss, and the best epoch by an average."""
        return {"batch_dice": True, "lambda_dice": 1.0, "lambda_ce": 1.0, **with_smoothed_dice(values)}


def check(recipe: TaffUNetRecipe) -> None:
    """Refuse a recipe whose prior nobody chose, or whose oracle is not wanted, and a grid that loses its image.

    Raises:
        CheckpointError: the trained autoencoder is another one than the network's, see `check_autoencoder`.
        MissingExtra: wfdb is not installed, and an ECG is a WFDB record.
        RecipeError: see `require_choice`; or images are mirrored or turned, and the grid of their ECGs stays.
    """
    network, preprocessing = recipe.network, recipe.data.preprocessing
    if network.takes_ecg:
        with suppress(DataError, ValueError, OSError):  # which come again once the run has its folder
            require_reader(recipe.data.open().ecgs)
    require_choice(network, recipe.prior, strict=recipe.strict)
    check_autoencoder(network)
    stays = network.takes_ecg and network.fusion_projection == "grid" and not network.grid_follows_image
    augmentation, patches = recipe.data.augmentation.make(recipe.data.augment), preprocessing.patches
    moves = {  # what moves an image, and the value with which it does not
        "data.augmentation.rotation_degrees": (augmentation is not None and augmentation.rotates, "0"),
        "data.augmentation.mirror_axes": (augmentation is not None and augmentation.mirrors, "[]"),
        "data.preprocessing.patches.mirror": (patches is not None and patches.mirror, "false"),
    }
    moving = {name: still for name, (does, still) in moves.items() if does}
    if stays and not network.takes_prior and moving:
        raise RecipeError(
            "network.grid_follows_image: false leaves the grid of an ECG where it is, but images are mirrored or "
            f"turned by {' and '.join(moving)}, and no prior says where what lies; set it to true, or "
            f"{' and '.join(f'{name} to {still}' for name, still in moving.items())}"
        )


def fit_options(model: TaffUNet, recipe: TaffUNetRecipe, data: PreparedData, out: Path) -> dict[str, Any]:
    """Return how this network is trained, as arguments of `trifuse.architectures.training.loop.fit`."""
    return {
        "loss": _loss(recipe),
        "forward": run_with_side_inputs,
        "param_groups": taff_param_groups(model, recipe.parts),
    }


def _loss(recipe: TaffUNetRecipe) -> ScarLoss:
    return ScarLoss(
        segmentation=SegmentationLoss(batch_dice=recipe.batch_dice, w_dice=recipe.lambda_dice, w_ce=recipe.lambda_ce),
        lambda_ecg=recipe.lambda_ecg,
        warmup_epochs=recipe.ecg_warmup_epochs,
        lambda_entropy=recipe.lambda_entropy,
        entropy_sign=recipe.entropy_sign,
        mask_padding=recipe.mask_padding,
    )


def run_with_side_inputs(model: Any, batch: dict[str, Any]) -> TaffOutput:
    """Run the network on a batch, with what it takes of it."""
    return model.run(batch["image"], **side_inputs_of(batch))


def prediction_side_inputs(
    model: TaffUNet,
    run: Path | None,
    cohort: Cohort,
    out: Path,
    *,
    prior_labels: Path | None,
    batch_size: int,
    max_ram: int | None = None,
) -> Mapping[str, SideInputs | DataError]:
    """Return what images to be predicted bring beside them, or what is wrong with it.

    Args:
        model: the network.
        run: its run, which says how inputs are made; None takes the defaults.
        cohort: the images.
        out: the predictions' folder; where the run's first pass has to find the wall, its label maps go to
            ``first_pass`` in it.
        prior_labels: folder of label maps to build the prior from.
        batch_size: slices at a time.
        max_ram: bytes that the first pass may take.

    Raises:
        DataError: there is nothing to build the prior from.
    """
    prior, ecg, broken = PriorRecipe("predicted"), EcgInputRecipe(), dict[str, DataError]()
    if run is not None:
        prior, ecg = run_section(run, "prior", PriorRecipe), run_section(run, "ecg", EcgInputRecipe)
    if model.config.takes_ecg:
        require_reader(cohort.ecgs)
    if model.config.takes_prior and prior_labels is None:
        prior_labels = predict_first_pass(
            run, cohort, out / FIRST_PASS_FOLDER, prior, batch_size, max_ram=max_ram, broken=broken
        )
    case_ids = [case.case_id for case in cohort.cases if case.case_id not in broken]
    found = case_side_inputs(cohort, case_ids, model.config, prior, ecg, labels=prior_labels, broken=broken)
    return {**found, **broken}


def training_side_inputs(
    recipe: TaffUNetRecipe, cohort: Cohort, split: Split, out: Path, *, force_resume: bool = False
) -> Mapping[str, SideInputs]:
    """Read what the cases bring beside their images; for the prior, a first pass may have to be trained before."""
    labels = None if recipe.prior.labels is None else Path(recipe.prior.labels)
    if recipe.network.takes_prior and recipe.prior.source == "predicted" and labels is None:
        labels = first_pass(recipe, cohort, split, out, force_resume=force_resume)
    used = (*split.train, *split.val, *split.test)
    with open_world(recipe.training.device) as world, world.raise_on_any_rank():
        return case_side_inputs(cohort, used, recipe.network, recipe.prior, recipe.ecg, labels=labels)


def report(best: TaffUNet, recipe: TaffUNetRecipe, data: PreparedData, out: Path) -> dict[str, Any]:
    """Return what only this network has to report, as arguments of `report_run`."""
    network = recipe.network
    shown = cases_with_ecg(best, data, data.split.test or data.cases_of(data.validated_on))
    heard = hear(best, data, shown) if shown else Heard({}, {})
    autoencoder = (
        "random weights" if network.ecg_checkpoint is None else f"weights of {Path(network.ecg_checkpoint).name}"
    )
    return {
        "mark": ORACLE if network.takes_prior and recipe.prior.source == "gt" else "",
        "facts": {
            "Setting": network.setting,
            "Loss": _loss(recipe).words(with_ecg=network.takes_ecg),
            **describe_inputs(data.side_inputs or {}, network, recipe.prior),
            **({"ECG autoencoder": f"started from {autoencoder}"} if network.takes_ecg else {}),
            **describe_gate(best, heard),
        },
        "draw": lambda log, scored, figures: draw_pictures(
            log.parent, best, data, recipe.prior, scored, figures, heard
        ),
    }


def title(recipe: TaffUNetRecipe) -> str:
    """Return the first line of a report."""
    prior = f", {recipe.prior.word}" if recipe.network.takes_prior else ""
    return f"TAFF-UNet ({recipe.network.setting}{prior}) on {Path(recipe.data.root).name}"
