"""Train TAFF-UNet on a cohort, predict its test cases, and write the report.

``python -m trifuse.architectures.taff_unet.train`` is ``trifuse train taff_unet``, alone or under torchrun.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Unpack

from trifuse.architectures.data.layouts.cohort import Cohort, Split
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.evaluation.report import PaperTable
from trifuse.architectures.runs.nnunet_recipe import VAL_DICE_EMA, nnunet_data, nnunet_training
from trifuse.architectures.runs.pipeline import FIRST_PASS_FOLDER, PreparedData, RunOptions, train_and_report
from trifuse.architectures.runs.predict import run_section
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.runs.repeats import repeat_training
from trifuse.architectures.storage.pretrained import config_to_json
from trifuse.architectures.training.loop import FitResult, beside_the_image, fit
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.scar_losses import ScarLoss

from .first_pass import first_pass, predict_first_pass
from .inputs import ORACLE, EcgRecipe, PriorRecipe, case_side_inputs, describe_inputs, require_choice
from .model import TaffOutput, TaffUNet, TaffUNetConfig
from .optimisation import PartsRecipe, taff_param_groups
from .report import draw_pictures

PAPER = "the paper on ECG- and AHA-17-guided scar segmentation with temporal-aware feature fusion"

RESULTS = PaperTable(
    "Paper-reported: scar, 21 test cases",
    ("Model", "Modality", "AP", "Dice", "Precision", "Sensitivity", "Volume difference"),
    (
        ("baseline", "LGE", "no", "0.6149", "0.7315", "0.7072", "4.436"),
        ("ablation", "LGE+ECG, no time", "no", "0.5916", "0.7351", "0.6398", "6.256"),
        ("ablation", "LGE+ECG, no time", "yes", "0.8234", "0.8234", "0.8900", "2.039"),
        ("ablation", "LGE", "yes", "0.8204", "0.9090", "0.8408", "2.196"),
        ("ours", "LGE+ECG, time", "yes", "0.8463", "0.9115", "0.9043", "1.971"),
    ),
    "AP is the AHA-17 prior; the paper does not say whether at test time it was built from the reference annotation. "
    "The unit of the volume difference is not stated. One row's Dice and precision agree to four digits.",
)


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
        lambda_ecg: weight of the reconstruction of the ECG, reached quadratically after
        ecg_warmup_epochs: epochs.
        mask_padding: whether the zeros around a beat are left out of it.
        lambda_entropy: weight of the entropy of the fusion's gate,
        entropy_sign: which is to be large (``"maximise"``), or added as the paper writes it (``"literal"``).
        strict: refuse an oracle prior.

    Raises:
        ValueError: data that do not fit the network.
    """

    data: DataRecipe = field(default_factory=nnunet_data)
    network: TaffUNetConfig = field(default_factory=TaffUNetConfig)
    training: Recipe = field(default_factory=nnunet_training)
    parts: PartsRecipe = field(default_factory=PartsRecipe)
    prior: PriorRecipe = field(default_factory=PriorRecipe)
    ecg: EcgRecipe = field(default_factory=EcgRecipe)
    lambda_ecg: float = 1.0
    ecg_warmup_epochs: float = 10.0
    mask_padding: bool = False
    lambda_entropy: float = 3e-3
    entropy_sign: Literal["maximise", "literal"] = "maximise"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.data.preprocessing.patches is None:
            raise ValueError("data.preprocessing.patches: this network is trained on patches; do not set it to null")
        if self.data.preprocessing.channels != 1:
            raise ValueError(f"data.preprocessing.channels must be 1, got {self.data.preprocessing.channels}")
        object.__setattr__(self, "network", replace(self.network, image_size=self.data.preprocessing.image_size))


def train(recipe: TaffUNetRecipe, out: Path, **options: Unpack[RunOptions]) -> Path | None:
    """Run a recipe from its data to ``out/report.md``, and return that path (None on all ranks but the first).

    With a predicted prior and no folder of labels for it, the first pass is trained before; see `first_pass`.

    Args:
        recipe: what to do.
        out: the run's folder.
        options: see `RunOptions`.

    Raises:
        RecipeError: nobody chose where the prior comes from, or it is an oracle and must not be.
        OutputFolderError, DataError, MissingExtra, CheckpointError, NumericError, Interrupted: see `train_and_report`.
    """
    require_choice(recipe.network, recipe.prior, strict=recipe.strict)
    return train_and_report(recipe, out, TaffUNet, fit_network, _describe, side_inputs=_side_inputs, **options)


def train_repeats(recipe: TaffUNetRecipe, out: Path, repeats: int, **options: Unpack[RunOptions]) -> Path | None:
    """Train with ``repeats`` seeds and report mean and SD over the runs; see `repeat_training`."""
    require_choice(recipe.network, recipe.prior, strict=recipe.strict)
    return repeat_training(
        train,
        recipe,
        out,
        repeats,
        title=_title(recipe),
        paper_tables=lambda targets: [RESULTS],
        paper=PAPER,
        **options,
    )


def fit_network(model: TaffUNet, recipe: TaffUNetRecipe, data: PreparedData, out: Path, **options: Any) -> FitResult:
    """Train a network on prepared data; ``options`` are those of `fit`."""
    return fit(
        model,
        data.train_set,
        recipe.training,
        out,
        loss=ScarLoss(
            lambda_ecg=recipe.lambda_ecg,
            warmup_epochs=recipe.ecg_warmup_epochs,
            lambda_entropy=recipe.lambda_entropy,
            entropy_sign=recipe.entropy_sign,
            mask_padding=recipe.mask_padding,
        ),
        validate=data.validation(recipe.training.batch_size),
        run_config={
            "architecture": TaffUNet.architecture,
            **{name: value for name, value in config_to_json(recipe).items() if name != "training"},
            "data": config_to_json(data.recipe),
        },
        config_type=type(recipe),
        step=run_with_side_inputs,
        param_groups=taff_param_groups(model, recipe.parts),
        monitor_smoothing=VAL_DICE_EMA,
        **options,
    )


def run_with_side_inputs(model: Any, batch: dict[str, Any]) -> TaffOutput:
    """Run the network on a batch, with what it takes of it."""
    return model.run(batch["image"], **beside_the_image(batch))


def prediction_side_inputs(
    model: TaffUNet, run: Path | None, cohort: Cohort, out: Path, *, prior_labels: Path | None, batch_size: int
) -> Mapping[str, SideInputs]:
    """Return what images to be predicted bring beside them.

    Args:
        model: the network.
        run: its run, which says how inputs are made; None takes the defaults.
        cohort: the images.
        out: the predictions' folder; where the run's first pass has to find the wall, its label maps go to
            ``first_pass`` in it.
        prior_labels: folder of label maps to build the prior from.
        batch_size: slices at a time.

    Raises:
        DataError: there is nothing to build the prior from.
    """
    prior, ecg = PriorRecipe("predicted"), EcgRecipe()
    if run is not None:
        prior, ecg = run_section(run, "prior", PriorRecipe), run_section(run, "ecg", EcgRecipe)
    if model.config.takes_prior and prior_labels is None:
        prior_labels = predict_first_pass(run, cohort, out / FIRST_PASS_FOLDER, prior, batch_size)
    case_ids = [case.case_id for case in cohort.cases]
    return case_side_inputs(cohort, case_ids, model.config, prior, ecg, labels=prior_labels)


def _side_inputs(recipe: TaffUNetRecipe, cohort: Cohort, split: Split, out: Path) -> Mapping[str, SideInputs]:
    """Read what the cases bring beside their images; for the prior, a first pass may have to be trained before."""
    labels = None if recipe.prior.labels is None else Path(recipe.prior.labels)
    if recipe.network.takes_prior and recipe.prior.source == "predicted" and labels is None:
        labels = first_pass(recipe, cohort, split, out)
    used = (*split.train, *split.val, *split.test)
    return case_side_inputs(cohort, used, recipe.network, recipe.prior, recipe.ecg, labels=labels)


def _describe(best: TaffUNet, recipe: TaffUNetRecipe, data: PreparedData) -> dict[str, Any]:
    """Return what only this network can say in its report."""
    network = recipe.network
    autoencoder = (
        "random weights" if network.ecg_checkpoint is None else f"weights of {Path(network.ecg_checkpoint).name}"
    )
    return {
        "title": _title(recipe),
        "mark": ORACLE if network.takes_prior and recipe.prior.source == "gt" else "",
        "facts": {
            "Setting": network.setting,
            **describe_inputs(data.side_inputs or {}, network, recipe.prior),
            **({"ECG autoencoder": f"started from {autoencoder}"} if network.takes_ecg else {}),
        },
        "draw": lambda log, scored, figures: draw_pictures(log.parent, best, data, recipe.prior, scored, figures),
        "paper_tables": [RESULTS],
        "paper": PAPER,
    }


def _title(recipe: TaffUNetRecipe) -> str:
    prior = f", {recipe.prior.word}" if recipe.network.takes_prior else ""
    return f"TAFF-UNet ({recipe.network.setting}{prior}) on {Path(recipe.data.root).name}"


if __name__ == "__main__":
    import sys

    from trifuse.architectures.cli.main import main

    sys.exit(main(["train", "taff_unet", *sys.argv[1:]]))
