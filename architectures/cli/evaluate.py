"""``trifuse evaluate``: score predictions against the labels of a cohort, or against a folder of label maps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trifuse.architectures.data.layouts.cohort_options import (
    AUTO,
    COHORT_OPTIONS,
    FRAME,
    LAYOUT_OPTION,
    PATIENT_PATTERN,
    TARGETS,
    cohort_arguments,
)
from trifuse.architectures.storage.text import count, listed

from .arguments import REPORTING, UsageError, add_cohort_options, add_command, between, refuse_existing

if TYPE_CHECKING:
    from trifuse.architectures.data.layouts.cohort import Cohort
    from trifuse.architectures.evaluation.metrics import Conventions
    from trifuse.architectures.evaluation.readouts import Readout
    from trifuse.architectures.evaluation.scoring import Pair, Row

SCORES = "scores"  # how the names of a report's tables begin

CONVENTIONS = ("strict", "transunet", "nnunet", "monai")
VOLUMES = ("absolute", "signed", "relative", "signed_relative")


def add_parser(commands: Any) -> None:
    """Add the command."""
    help = "score predictions against the labels of a cohort, or against a folder of label maps"
    parser = add_command(commands, "evaluate", run, help, _needs)
    parser.add_argument("predictions", type=Path, help="folder of <case>.nii.gz")
    add_cohort_options(parser, help="folder of the cohort, in any of the layouts; or of label maps, <case>.nii.gz")
    help = "CSV file, one line per case and class; further conventions beside it (none: the summary is printed alone)"
    parser.add_argument("--out", type=Path, help=help)
    help = "folder for a report, new or empty: scores, agreement of volumes, read-outs in mL, g and %%"
    parser.add_argument("--report", type=Path, help=help)
    help = "cases to score (all with labels)"
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", default=["*"], help=help)
    help = "of empty masks and distances (strict); several are shown side by side, with the rules that differ"
    parser.add_argument("--convention", nargs="+", choices=CONVENTIONS, default=["strict"], help=help)
    help = "which slices count (%(default)s)"
    parser.add_argument("--slices", choices=("all", "labelled"), default="all", help=help)
    help = "how the volume difference is stated (%(default)s)"
    parser.add_argument("--volume", choices=VOLUMES, default="absolute", help=help)
    parser.add_argument("--per-slice", action="store_true", help="one score per slice instead of per volume")
    help = "HD95 in voxels (always so with --convention transunet)"
    parser.add_argument("--voxels", action="store_true", help=help)
    help = "level of the intervals of means, by patient (95); one patient has none, and is refused if this is given"
    parser.add_argument("--interval", type=between(0, 100, 95), metavar="PERCENT", help=help)
    help = "with --report: also the scar's share of each AHA segment; where angles start"
    parser.add_argument("--segments", choices=("landmarks", "orientation"), help=help)
    help = "score even if a voxel spacing looks implausible"
    parser.add_argument("--accept-spacing", action="store_true", help=help)
    help = "predictions hold the label values of the cohort, not class ids"
    parser.add_argument("--label-values", action="store_true", help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace earlier tables of scores")


def _needs(arguments: argparse.Namespace) -> tuple[str, ...]:
    return REPORTING if arguments.report else ("scipy",)


class Judged(NamedTuple):
    """What is judged: how to score it under some conventions, and what there is to read off it."""

    cohort: Cohort
    patients: int
    score: Callable[[Conventions], list[Row]]
    pairs: Callable[[], Iterable[Pair]]


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Score every case under every convention, write a table of each, and print the summary."""
    from trifuse.architectures.evaluation.label_folders import is_label_folder
    from trifuse.architectures.evaluation.metrics import Conventions
    from trifuse.architectures.evaluation.summary import LEVEL, failures
    from trifuse.architectures.evaluation.tables import is_case_table, write_case_table

    tables = _tables(arguments)
    for table in tables.values():
        if table is not None:
            refuse_existing(table, "a table of scores", is_case_table if arguments.overwrite else None)
    _check(arguments)
    plain_folders = arguments.layout in (None, AUTO) and is_label_folder(arguments.data)
    judged = _label_folders(arguments) if plain_folders else _cohort(arguments)
    _require_patients(arguments, judged)
    segments = _segments(arguments, judged) if arguments.segments else []
    every = [
        judged.score(
            Conventions(
                convention,
                hd_unit="vox" if arguments.voxels else "",
                volume=arguments.volume,
                aggregation="slice" if arguments.per_slice else "volume",
                slices=arguments.slices,
            )
        )
        for convention in tables
    ]
    for table, rows in zip(tables.values(), every, strict=True):
        if table is not None:
            write_case_table(table, rows)
    level = LEVEL if arguments.interval is None else arguments.interval / 100
    _say(every, level)
    if arguments.out:
        print(f"cases: {', '.join(map(str, tables.values()))}")
    if arguments.report:
        print(f"report: {_write_report(arguments, judged, every, segments, level, argv)}")
    failed = failures(every[0])  # the same ones under every convention
    for line in failed:
        print(f"failed, and scored as such: {line}", file=sys.stderr)
    return 3 if failed else 0


def _say(every: Sequence[Sequence[Row]], level: float) -> None:
    """Print the summary under every convention, which rules differ from the first one's, and the headline."""
    from trifuse.architectures.evaluation.intervals import summarise_with_intervals
    from trifuse.architectures.evaluation.protocols import changed_scores, differing_rules
    from trifuse.architectures.evaluation.summary import PUBLISHED, Scored, format_summary, headline_words, plain

    first, *others = (Scored(rows[0].conventions, summarise_with_intervals(rows, level)) for rows in every)
    print(format_summary(first, *others))
    for rows, other in zip(every[1:], others, strict=True):
        rules = differing_rules(first.conventions, other.conventions, PUBLISHED)
        print("\n".join(["", *(f"* {plain(rule)}" for rule in rules), changed_scores(every[0], rows, PUBLISHED)]))
    print(f"\n{plain(' '.join(headline_words(every[0])))}")


def _check(arguments: argparse.Namespace) -> None:
    """Refuse, before anything is read, what makes no sense, and folders that are taken."""
    from trifuse.architectures.evaluation.report import REPORT

    out = arguments.report
    if arguments.segments and out is None:
        raise UsageError("--segments is for the read-outs of a report: say with --report which folder that goes to")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        is_ours = (out / REPORT).is_file() and (out / f"{SCORES}_cases.csv").is_file()
        if not (arguments.overwrite and is_ours):
            earlier = ", or with --overwrite an earlier report" if not arguments.overwrite else " or an earlier report"
            raise UsageError(f"{out} exists already; expected a new or an empty folder{earlier}; choose another")
    if not arguments.predictions.is_dir():
        raise UsageError(f"{arguments.predictions} is no folder; expected the one that trifuse predict wrote")


def _require_patients(arguments: argparse.Namespace, judged: Judged) -> None:
    """Refuse an interval that is asked of one patient."""
    from trifuse.kernels import DataError

    if arguments.interval is not None and judged.patients < 2:
        want, hint = "at least 2: an interval of one says nothing about others", "leave out --interval"
        raise DataError(arguments.data, "patients", got=judged.patients, want=want, hint=hint)


def _cohort(arguments: argparse.Namespace) -> Judged:
    """Return what scores the predictions against the labels of a cohort."""
    from trifuse.architectures.data.layouts.open_cohort import open_cohort
    from trifuse.architectures.evaluation.prediction_folder import MANIFEST, made_of_other_images
    from trifuse.architectures.evaluation.scoring import evaluate_cases, read_pairs
    from trifuse.architectures.runs.recipes import matching_cases

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
    judged, values = (arguments.predictions, cohort, cases), {"label_values": arguments.label_values}
    return Judged(
        cohort,
        len({cohort.case(case_id).patient for case_id in cases}),
        lambda conventions: evaluate_cases(*judged, conventions, accept_spacing=arguments.accept_spacing, **values),
        lambda: read_pairs(*judged, **values),
    )


def _label_folders(arguments: argparse.Namespace) -> Judged:
    """Return what scores the predictions against a folder of label maps, once the two are seen to fit each other."""
    from trifuse.architectures.evaluation.label_folders import (
        label_cohort,
        open_label_folders,
        pairs_of_classes,
        score_label_folders,
    )
    from trifuse.architectures.runs.recipes import matching_cases
    from trifuse.architectures.storage.file_names import real_path

    if real_path(arguments.predictions) == real_path(arguments.data):
        raise UsageError(f"expected a folder of predictions and one of labels, got {arguments.data} twice")
    given = [option for option in COHORT_OPTIONS if getattr(arguments, option.name) is not None]
    if strange := [option.flag for option in given if option not in (LAYOUT_OPTION, TARGETS, PATIENT_PATTERN, FRAME)]:
        raise UsageError(f"{', '.join(strange)}: for a cohort, and {arguments.data} is a folder of label maps")
    cohort = label_cohort(arguments.data, patient_pattern=arguments.patient_pattern, frame=arguments.frame)
    cases = matching_cases(cohort, [case.case_id for case in cohort.cases], arguments.cases)
    folders = open_label_folders(
        arguments.predictions, cohort, cases, targets=arguments.targets, accept_spacing=arguments.accept_spacing
    )
    return Judged(
        folders.cohort,
        len({cohort.case(case_id).patient for case_id in cases}),
        lambda conventions: score_label_folders(folders, conventions),
        lambda: pairs_of_classes(folders),
    )


def _segments(arguments: argparse.Namespace, judged: Judged) -> list[Readout]:
    """Return the scar's share of the segments of every heart whose wall can be divided; a note names the others."""
    from trifuse.architectures.taff_unet.inputs import UndividedWall
    from trifuse.architectures.taff_unet.segment_readouts import check_scar_classes, segment_burdens

    names, found = judged.cohort.class_names, []
    check_scar_classes(arguments.data, names)
    for case, truth, prediction in judged.pairs():
        try:
            found += segment_burdens(case, truth, prediction, names, arguments.segments)
        except UndividedWall as error:
            print(f"note: no segments of {case.case_id}: {error}", file=sys.stderr)
    return found


def _write_report(
    arguments: argparse.Namespace,
    judged: Judged,
    every: Sequence[Sequence[Row]],
    segments: Sequence[Readout],
    level: float,
    argv: list[str],
) -> Path:
    """Write the report of all conventions, and return its path."""
    from trifuse.architectures.evaluation.bland_altman import draw_agreement
    from trifuse.architectures.evaluation.report import Evaluation, write_report
    from trifuse.architectures.evaluation.summary import OWN_PATIENTS, are_own_patients

    rows, *beside = every
    cases = {row.case_id: row.patient for row in rows}
    of = OWN_PATIENTS if are_own_patients(cases.items()) else f"of {count(judged.patients, 'patient')}"
    agreement = draw_agreement(rows, arguments.report)
    return write_report(
        arguments.report,
        title=f"{arguments.predictions.name} against {arguments.data.name}",
        evaluations=[Evaluation(SCORES, "All cases", rows, beside, level=level, readouts=segments)],
        pictures=[agreement] if agreement else [],
        facts={
            "Predictions": arguments.predictions.name,
            "Truth": f"{arguments.data.name}, {judged.cohort.layout}",
            "Classes": ", ".join(f"{number} {name}" for number, name in enumerate(judged.cohort.class_names)),
            "Scored": f"{count(len(cases), 'case')}{', ' if of == OWN_PATIENTS else ' '}{of}",
        },
        command=argv,
    )


def _tables(arguments: argparse.Namespace) -> dict[str, Path | None]:
    """Return the table of each convention: the one that was asked for, and further ones beside it."""
    first, *others = dict.fromkeys(arguments.convention)
    out = arguments.out
    beside = {convention: out and out.with_stem(f"{out.stem}_{convention}") for convention in others}
    return {first: out, **beside}


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
