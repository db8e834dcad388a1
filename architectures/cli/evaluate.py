"""``trifuse evaluate``: score predictions against the labels of a cohort."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts.cohort_options import cohort_arguments
from trifuse.architectures.storage.text import count, listed

from .arguments import UsageError, add_cohort_options, add_command, refuse_existing

CONVENTIONS = ("strict", "transunet", "nnunet", "monai")
VOLUMES = ("absolute", "signed", "relative", "signed_relative")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "evaluate", run, "score predictions against the labels of a cohort")
    parser.add_argument("predictions", type=Path, help="folder of <case>.nii.gz")
    add_cohort_options(parser)
    help = "CSV file, one line per case and class; further conventions beside it"
    parser.add_argument("--out", type=Path, required=True, help=help)
    help = "cases to score (all with labels)"
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", default=["*"], help=help)
    help = "of empty masks and distances (strict); several are shown side by side"
    parser.add_argument("--convention", nargs="+", choices=CONVENTIONS, default=["strict"], help=help)
    help = "which slices count (%(default)s)"
    parser.add_argument("--slices", choices=("all", "labelled"), default="all", help=help)
    help = "how the volume difference is stated (%(default)s)"
    parser.add_argument("--volume", choices=VOLUMES, default="absolute", help=help)
    parser.add_argument("--per-slice", action="store_true", help="one score per slice instead of per volume")
    help = "HD95 in voxels (always so with --convention transunet)"
    parser.add_argument("--voxels", action="store_true", help=help)
    help = "score even if a voxel spacing looks implausible"
    parser.add_argument("--accept-spacing", action="store_true", help=help)
    help = "predictions hold the label values of the cohort, not class ids"
    parser.add_argument("--label-values", action="store_true", help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace earlier tables of scores")


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Score every case under every convention, write a table of each, and print the summary."""
    from trifuse.architectures.data.layouts.open_cohort import open_cohort
    from trifuse.architectures.evaluation.metrics import Conventions
    from trifuse.architectures.evaluation.prediction_folder import MANIFEST, made_of_other_images
    from trifuse.architectures.evaluation.scoring import evaluate_cases
    from trifuse.architectures.evaluation.summary import (
        Scored,
        failures,
        format_summary,
        headline_words,
        plain,
        summarise,
    )
    from trifuse.architectures.evaluation.tables import is_case_table, write_case_table
    from trifuse.architectures.runs.recipes import matching_cases

    tables = _tables(arguments)
    for table in tables.values():
        refuse_existing(table, "a table of scores", is_case_table if arguments.overwrite else None)
    if not arguments.predictions.is_dir():
        raise UsageError(f"{arguments.predictions} is no folder; expected the one that trifuse predict wrote")
    cohort = open_cohort(arguments.data, **cohort_arguments(arguments))
    labelled = [case.case_id for case in cohort.cases if case.label is not None]
    cases = matching_cases(cohort, labelled, arguments.cases)
    _require_predictions(arguments.predictions, cases)
    if others := made_of_other_images(arguments.predictions, [cohort.case(case_id) for case_id in cases]):
        print(
            f"note: {arguments.predictions}: {count(len(others), 'label map')} made of other files than the images of "
            f"{arguments.data}, by {MANIFEST}: {listed(others)}",
            file=sys.stderr,
        )
    scored, headlines = [], []
    for convention, table in tables.items():
        conventions = Conventions(
            convention,
            hd_unit="vox" if arguments.voxels else "",
            volume=arguments.volume,
            aggregation="slice" if arguments.per_slice else "volume",
            slices=arguments.slices,
        )
        rows = evaluate_cases(
            arguments.predictions,
            cohort,
            cases,
            conventions,
            accept_spacing=arguments.accept_spacing,
            label_values=arguments.label_values,
        )
        write_case_table(table, rows)
        headlines.append(plain(" ".join(headline_words(rows))))
        scored.append(Scored(rows[0].conventions, summarise(rows)))
        failed = failures(rows)  # the same ones under every convention
    print(f"{format_summary(*scored)}\n\n{headlines[0]}")
    print(f"cases: {', '.join(map(str, tables.values()))}")
    for line in failed:
        print(f"failed, and scored as such: {line}", file=sys.stderr)
    return 3 if failed else 0


def _tables(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return the table of each convention: the one that was asked for, and further ones beside it."""
    first, *others = dict.fromkeys(arguments.convention)
    out = arguments.out
    return {first: out, **{convention: out.with_stem(f"{out.stem}_{convention}") for convention in others}}


def _require_predictions(folder: Path, cases: Sequence[str]) -> None:
    """Refuse a folder without a single prediction: it is another one that was meant."""
    from trifuse.architectures.evaluation.scoring import prediction_path
    from trifuse.kernels import DataError

    if not any(prediction_path(folder, case).exists() for case in cases):
        within = sorted({str(path.parent) for path in folder.glob("predictions/*/*.nii.gz")})
        hint = f"those of this run lie in {' and '.join(within)}" if within else ""
        if any((folder / f"{case}_0000.nii.gz").exists() for case in cases):
            hint = "label maps have no channels: leave the _0000 out of their names"
        want = f"<case>.nii.gz for at least one of {count(len(cases), 'case')}, such as {cases[0]}.nii.gz"
        raise DataError(folder, "predictions", got="none", want=want, hint=hint)
