"""``trifuse train``: train a network, or a part of one, predict its test cases, and write a report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts.cohort_options import COHORT_OPTIONS
from trifuse.architectures.data.layouts.layout import Option
from trifuse.architectures.runs.experiment import Experiment, Pretraining
from trifuse.architectures.runs.options import OptionGroup, RecipeOption, positive
from trifuse.architectures.runs.registry import experiments
from trifuse.architectures.storage.run_loggers import LOGGERS
from trifuse.architectures.storage.text import count

from .arguments import COHORT, NONFINITE, add_command, add_commands, add_group, given_values

PARTS = ("train", "val", "test")
_PATTERNS = {"nargs": "+", "metavar": "PATTERN"}

CASES = OptionGroup(
    "cases and slices",
    (
        RecipeOption("data.split", "--split", 'JSON file with "train", "val" and "test"', {"type": Path}),
        RecipeOption("data.val_cases", "--val-cases", "cases that choose the best epoch", _PATTERNS),
        RecipeOption(
            "data.val_patients",
            "--val-patients",
            "patients of the training cases to draw for it, where a split has none",
            {"type": int, "metavar": "N"},
        ),
        RecipeOption("data.test_cases", "--test-cases", "cases that are never trained on", _PATTERNS),
        RecipeOption("data.preprocessing.image_size", "--image-size", "side that slices are resized to", {"type": int}),
        RecipeOption(
            "data.preprocessing.window",
            "--window",
            "clip intensities to LOW..HIGH, e.g. -125 275 HU for a CT",
            {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")},
            sets={"data.preprocessing.intensity": "window"},
        ),
        RecipeOption(
            "data.preprocessing.nonfinite",
            "--nonfinite",
            "how to treat NaN and infinite voxels (error)",
            {"choices": NONFINITE},
        ),
        RecipeOption(
            "data.slices",
            "--slices",
            "slices to train on (all)",
            {"choices": ("all", "foreground", "labelled")},
            aliases=("--keep",),
        ),
        RecipeOption(
            "data.augment",
            "--augment",
            "how samples are varied",
            {"choices": ("none", "flip_rot", "transunet", "nnunet")},
        ),
    ),
)
TRAINING = OptionGroup(
    "training",
    (
        RecipeOption(
            "training.epochs",
            "--epochs",
            "number of epochs, each of all training slices or 3000 patches",
            {"type": int},
        ),
        RecipeOption("training.batch_size", "--batch-size", "slices per step, over all processes", {"type": int}),
        RecipeOption("training.lr", "--lr", "highest learning rate", {"type": float}),
        RecipeOption(
            "training.precision",
            "--precision",
            "of the forward pass: auto is bf16 on a GPU that computes in it, fp32 elsewhere (auto)",
            {"choices": ("auto", "fp32", "bf16", "fp16")},
        ),
        RecipeOption(
            "training.tf32",
            "--tf32",
            "whether float32 products on a GPU round to TF32; by default convolutions alone do (default)",
            {"choices": ("default", "on", "off")},
        ),
        RecipeOption(
            "training.compile",
            "--compile",
            "compile the forward and backward pass, for a run of many steps",
            {"action": "store_true", "default": None},
        ),
        RecipeOption(
            "training.cuda_graph",
            "--cuda-graph",
            "record a step on the GPU, and replay it",
            {"action": "store_true", "default": None},
        ),
        RecipeOption("training.accumulate", "--accumulate", "micro-batches per step (1)", {"type": int}),
        RecipeOption(
            "training.init", "--init", "folder of a run, or of its network, whose weights to start from", {"type": Path}
        ),
        RecipeOption(
            "training.reset_head",
            "--reset-head",
            "but draw those of the head anew, as for other classes",
            {"action": "store_true", "default": None},
        ),
        RecipeOption("training.seed", "--seed", "of the order of samples and of augmentation", {"type": int}),
        RecipeOption("training.workers", "--workers", "processes that load slices (0)", {"type": int}),
        RecipeOption("training.device", "--device", "auto, cpu, cuda or cuda:<index> (auto)"),
    ),
)


def add_parser(commands: Any) -> None:
    """Add the command, its networks, and the parts of networks that are trained by themselves."""
    help = "train a network, predict its test cases, write a report"
    networks = add_commands(commands, "train", help, "networks", "NETWORK")
    for experiment in experiments():
        _add_network(networks, experiment)
    for experiment in experiments():
        for pretraining in experiment.pretrainings:
            _add_pretraining(networks, experiment, pretraining)


def _add_network(networks: Any, experiment: Experiment) -> None:
    parser = add_command(networks, experiment.name, run, experiment.summary)
    groups = [OptionGroup("cohort", (COHORT, *COHORT_OPTIONS)), *_groups(experiment)]
    _add_run_options(parser)
    parser.add_argument("--repeats", type=positive, default=1, help="runs with other seeds, and a report over them (1)")
    parser.add_argument("--report", nargs="+", choices=PARTS, default=["test"], help="parts to score")
    help = "print what the paper leaves open, what this run would do, and which option changes it; train nothing"
    parser.add_argument("--show-assumptions", action="store_true", help=help)
    for group in groups:
        add_group(parser, group)
    parser.set_defaults(experiment=experiment, training=experiment, options=_options(groups))


def _groups(experiment: Experiment) -> list[OptionGroup]:
    """Return the options that all networks have, with this one's defaults in their help, and its own."""
    shown = experiment.shown_defaults
    shared = [
        OptionGroup(group.title, tuple(_with_default(option, shown) for option in group.options))
        for group in (CASES, TRAINING)
    ]
    if not experiment.variants:
        return [*shared, *experiment.options]
    keywords = {"choices": experiment.variants}
    variant = _with_default(RecipeOption("network.variant", "--variant", "size of the encoder", keywords), shown)
    own = {group.title: group for group in (OptionGroup("network", ()), *experiment.options)}
    own["network"] = OptionGroup("network", (variant, *own["network"].options))
    return [*shared, *own.values()]


def _with_default(option: Option, shown: Mapping[str, str]) -> Option:
    default = shown.get(option.name)
    return option if default is None else replace(option, help=f"{option.help} ({default})")


def _add_pretraining(networks: Any, experiment: Experiment, pretraining: Pretraining) -> None:
    parser = add_command(networks, pretraining.name, run, pretraining.summary)
    source = parser.add_mutually_exclusive_group(required=True)
    for option in pretraining.sources:
        option.add_to(source)
    for option in pretraining.options:
        option.add_to(parser)
    _add_run_options(parser)
    for group in pretraining.groups:
        add_group(parser, group)
    options = (*pretraining.sources, *pretraining.options, *_options(pretraining.groups))
    parser.set_defaults(experiment=experiment, training=pretraining, options=options)


def _options(groups: Sequence[OptionGroup]) -> tuple[Option, ...]:
    return tuple(option for group in groups for option in group.options)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add where a run goes, whether it goes on, and how any field of its recipe is set."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder, or train it longer")
    parser.add_argument("--force-resume", action="store_true", help="continue it although anything else has changed")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in that folder, once the new one trains"
    )
    help = "what gets the numbers of every epoch beside log.csv (nothing)"
    parser.add_argument("--log", nargs="+", choices=tuple(LOGGERS), default=[], help=help)
    parser.add_argument("--config", type=Path, help="TOML file with [data], [network] and [training]")
    help = "any field of the recipe, e.g. training.ema_decay=0.999; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=help)


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Train what the arguments describe, and print the headline and where the report lies."""
    from trifuse.architectures.evaluation.report import headline_of
    from trifuse.architectures.runs.folder import epochs_of
    from trifuse.architectures.runs.pipeline import RunOptions, train
    from trifuse.architectures.runs.recipes import recipe_from
    from trifuse.architectures.runs.repeats import train_repeats

    experiment, training = arguments.experiment, arguments.training
    given = given_values(arguments, arguments.options)
    defaults = experiment.load(training.defaults, lambda given, config: {})(given, arguments.config)
    if (arguments.resume or arguments.force_resume) and (epochs := epochs_of(arguments.out)):
        defaults = {**defaults, "training.epochs": epochs}  # who resumes without a number means the run's
    recipe = recipe_from(experiment.load(training.recipe), arguments.config, given, arguments.set, defaults=defaults)
    if getattr(arguments, "show_assumptions", False):  # of networks alone
        _show_assumptions(experiment, recipe, arguments.options)
        return
    loggers = [LOGGERS[name]() for name in dict.fromkeys(arguments.log)]
    options: RunOptions = {
        "resume": arguments.resume,
        "overwrite": arguments.overwrite,
        "force_resume": arguments.force_resume,
        "loggers": loggers,
        "command": argv,
    }
    if isinstance(training, Pretraining):
        report = experiment.load(training.run)(recipe, arguments.out, **options)
    else:
        options["parts"] = arguments.report
        if arguments.repeats > 1:
            report = train_repeats(recipe, arguments.out, arguments.repeats, **options)
        else:
            report = train(recipe, arguments.out, **options)
    if report is not None:  # it is on all ranks but the first
        print(f"{headline_of(report)}\nreport: {report}")


def _show_assumptions(experiment: Experiment, recipe: Any, options: Sequence[Option]) -> None:
    """Print what a run of a recipe would settle that its network's paper does not, a line each."""
    from trifuse.architectures.runs.decisions import assumptions

    flags = {option.field: option.flag for option in options if option.flag.startswith("-")}
    paper = experiment.load(experiment.paper, "no paper")
    lines = assumptions(experiment.load(experiment.decisions, ()), recipe, flags)
    print(f"{experiment.name}, after {paper}: {count(len(lines), 'assumption')}")
    print("\n".join(lines))
