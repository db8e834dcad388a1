"""What ``trifuse train`` does for each network once its words are understood; see commands.py for the others."""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trifuse.architectures.data.layouts.cohort_options import COHORT_OPTIONS

if TYPE_CHECKING:
    from trifuse.architectures.runs.pipeline import RunOptions

# where the options of `trifuse train` go in a recipe
_FIELDS = {
    "data": "data.root",
    **{option.name: option.field for option in COHORT_OPTIONS},
    "split": "data.split",
    "val_cases": "data.val_cases",
    "test_cases": "data.test_cases",
    "image_size": "data.preprocessing.image_size",
    "slices": "data.slices",
    "augment": "data.augment",
    "variant": "network.variant",
    "encoder": "network.encoder_checkpoint",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "lr": "training.lr",
    "precision": "training.precision",
    "accumulate": "training.accumulate",
    "seed": "training.seed",
    "workers": "training.workers",
    "device": "training.device",
    "cache_features": "cache_features",
    "setting": "network.setting",
    "ecg": "network.ecg_checkpoint",
    "prior": "prior.source",
    "prior_labels": "prior.labels",
    "reference": "prior.reference",
    "strict": "strict",
}

_ECG_FIELDS = {
    "data": "data.root",
    "also": "data.also",
    "val_records": "data.val_records",
    "test_records": "data.test_records",
    "min_beats": "data.min_beats",
    "init": "init",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "lr": "training.lr",
    "seed": "training.seed",
    "workers": "training.workers",
    "device": "training.device",
}


def train_dino_unet(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.dino_unet import train

    given = _given(arguments, "dinov2")
    if arguments.epochs is not None and arguments.config is None:
        given = {"training.warmup_epochs": min(5.0, arguments.epochs / 10)} | given  # the paper's share of a short run
    _train(arguments, words, train, train.DinoUNetRecipe, given, {})


def train_fias(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.data.layouts.open_cohort import AUTO, layout_of
    from trifuse.architectures.fias import train

    layout = layout_of(arguments.data, arguments.layout or AUTO) if arguments.data.is_dir() else None
    given = _given(arguments, "dilateformer")
    _train(arguments, words, train, train.FiasRecipe, given, train.layout_defaults(layout))


def train_plain_unet(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.plain_unet import train

    _train(arguments, words, train, train.PlainUNetRecipe, _given(arguments), {})


def train_taff_unet(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.taff_unet import train

    _train(arguments, words, train, train.TaffUNetRecipe, _given(arguments), {})


def train_ecg(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.runs.pipeline import is_main_process
    from trifuse.architectures.runs.recipes import recipe_from
    from trifuse.architectures.taff_unet import pretrain

    given = {path: value for option, path in _ECG_FIELDS.items() if (value := getattr(arguments, option)) is not None}
    if arguments.cohort is not None:
        given |= {"data.root": arguments.cohort, "data.kind": "cohort"}
    defaults = pretrain.training_defaults(cohort=arguments.cohort is not None, epochs=arguments.epochs)
    recipe = recipe_from(pretrain.EcgRecipe, arguments.config, given, arguments.set, defaults=defaults)
    report = pretrain.train(recipe, arguments.out, **_run_options(arguments, words))
    if is_main_process():
        print(f"report: {report}")


def _given(arguments: argparse.Namespace, encoder: str = "") -> dict[str, Any]:
    """Return the fields of a recipe that the words of the command set, those that converted weights bring first."""
    given = {
        path: value
        for option, path in _FIELDS.items()
        if (value := getattr(arguments, option, None)) is not None and value is not False
    }
    if arguments.window is not None:
        given |= {"data.preprocessing.intensity": "window", "data.preprocessing.window": arguments.window}
    if encoder and arguments.encoder is not None:
        from trifuse.architectures.storage.pretrained import read_description

        described = read_description(arguments.encoder, encoder)["config"]  # variant, registers, position mode
        given = {f"network.{name}": value for name, value in described.items()} | given
    return given


def _train(
    arguments: argparse.Namespace,
    words: list[str],
    network: ModuleType,
    kind: type,
    given: dict[str, Any],
    defaults: dict[str, Any],
) -> None:
    """Train with a network's ``train.py``, once or several times."""
    from trifuse.architectures.runs.pipeline import is_main_process
    from trifuse.architectures.runs.recipes import recipe_from

    recipe = recipe_from(kind, arguments.config, given, arguments.set, defaults=defaults)
    options = _run_options(arguments, words)
    options["parts"] = arguments.report
    if arguments.repeats > 1:
        report = network.train_repeats(recipe, arguments.out, arguments.repeats, **options)
    else:
        report = network.train(recipe, arguments.out, **options)
    if is_main_process():
        print(f"report: {report}")


def _run_options(arguments: argparse.Namespace, words: list[str]) -> RunOptions:
    return {
        "resume": arguments.resume,
        "overwrite": arguments.overwrite,
        "force_resume": arguments.force_resume,
        "tensorboard": arguments.tensorboard,
        "command": words,
    }
