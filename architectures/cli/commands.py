"""What each command does once its words are understood: collect the arguments, call the library, print the result.

A function here has the name of its command, takes the parsed arguments and the words themselves, and returns the exit
code, or None for 0. It imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trifuse.architectures.storage.text import count


class UsageError(Exception):
    """The words of a command make no sense together."""


def demo_dino_unet(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.dino_unet.demo import run_demo

    run_demo(arguments.out, seed=arguments.seed, overwrite=arguments.overwrite, command=words)


def demo_fias(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.fias.demo import run_demo

    run_demo(arguments.out, seed=arguments.seed, overwrite=arguments.overwrite, command=words)


def demo_taff_unet(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.taff_unet.demo import run_demo

    run_demo(arguments.out, seed=arguments.seed, overwrite=arguments.overwrite, command=words)


def data_check(arguments: argparse.Namespace, words: list[str]) -> int:
    from trifuse.architectures.data.layouts.check import check_folder
    from trifuse.architectures.data.layouts.cohort_options import cohort_arguments

    if arguments.digests is not None:
        _require_folder_of(arguments.digests)
    findings = check_folder(arguments.data, **cohort_arguments(arguments), digests=arguments.digests)
    cohort = findings.cohort
    cases = count(len(cohort.cases), "case")
    print(f"{arguments.data}: {cohort.layout} layout, {cases}, classes {', '.join(cohort.class_names)}")
    for warning in findings.warnings:
        print(f"warning: {warning}")
    for error in findings.errors:
        print(f"error: {error}")
    print(f"{count(len(findings.errors), 'error')}, {count(len(findings.warnings), 'warning')}")
    return 3 if findings.errors or (arguments.strict and findings.warnings) else 0


def data_check_ecg(arguments: argparse.Namespace, words: list[str]) -> int:
    from trifuse.architectures.data.ecg.check import check_ecgs

    findings = check_ecgs(arguments.data, min_beats=arguments.min_beats)
    for note in findings.notes:
        print(f"note: {note}")
    for record in findings.records:
        print(record)
    print(f"{count(len(findings.records), 'record')}, {count(len(findings.errors), 'error')}")
    return 3 if findings.errors else 0


def data_convert(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.data.layouts import LAYOUTS
    from trifuse.architectures.data.layouts.cohort_options import cohort_arguments
    from trifuse.architectures.data.layouts.export import write_cohort
    from trifuse.architectures.data.layouts.open_cohort import open_cohort
    from trifuse.architectures.runs.recipes import DataRecipe

    cohort = open_cohort(arguments.data, **cohort_arguments(arguments))
    split = cohort.split
    if arguments.split or arguments.test_cases:
        chosen = DataRecipe(split=arguments.split and str(arguments.split), test_cases=tuple(arguments.test_cases))
        split = chosen.choose_split(cohort)
    layout, export = next((one, one.export) for one in LAYOUTS if one.export is not None and one.name == arguments.to)
    options = {option.name: getattr(arguments, option.name) for option in export.options}
    write_cohort(layout, cohort, arguments.out, split, nonfinite=arguments.nonfinite, **options)
    if note := export.note(cohort):
        print(f"note: {note}")
    if len({case.patient for case in cohort.cases}) < len(cohort.cases):
        print("note: this layout does not tell patients: when it is read, --patient finds them in the cases' names")
    print(f"{count(len(cohort.cases), 'case')}, of which {len(split.test) if split else 0} test, in {arguments.out}")


def predict(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.data.samples.preprocessing import Preprocessing
    from trifuse.architectures.runs.predict import predict_images

    window = None if arguments.window is None else tuple(arguments.window)
    if window is not None:
        try:
            Preprocessing("window", window)
        except ValueError as error:
            raise UsageError(str(error)) from error
    paths = predict_images(
        arguments.model,
        arguments.images,
        arguments.out,
        window=window,
        image_size=arguments.image_size,
        batch_size=arguments.batch_size,
        device=arguments.device,
        nonfinite=arguments.nonfinite,
        prior_labels=arguments.prior_labels,
        spacing_mm=None if arguments.spacing is None else tuple(arguments.spacing),
    )
    print(f"{count(len(paths), 'label map')} in {arguments.out}")


def evaluate(arguments: argparse.Namespace, words: list[str]) -> int:
    from trifuse.architectures.data.layouts.cohort_options import cohort_arguments
    from trifuse.architectures.data.layouts.open_cohort import open_cohort
    from trifuse.architectures.evaluation.metrics import Conventions
    from trifuse.architectures.evaluation.scoring import evaluate_cases
    from trifuse.architectures.evaluation.summary import Scored, failures, format_summary, summarise
    from trifuse.architectures.evaluation.tables import write_case_table
    from trifuse.architectures.runs.recipes import matching_cases

    first, *others = dict.fromkeys(arguments.convention)
    tables = {
        first: arguments.out,
        **{word: arguments.out.with_stem(f"{arguments.out.stem}_{word}") for word in others},
    }
    for table in tables.values():
        _refuse_existing(table, arguments.overwrite)
    if not arguments.predictions.is_dir():
        raise UsageError(f"{arguments.predictions} is no folder; expected the one that trifuse predict wrote")
    cohort = open_cohort(arguments.data, **cohort_arguments(arguments))
    labelled = [case.case_id for case in cohort.cases if case.label is not None]
    cases = matching_cases(cohort, labelled, arguments.cases)
    _require_predictions(arguments.predictions, cases)
    scored = []
    for word, table in tables.items():
        conventions = Conventions(
            word,
            hd_unit="vox" if arguments.voxels else "",
            volume=arguments.volume,
            aggregation="slice" if arguments.per_slice else "volume",
            slices=arguments.slices,
        )
        rows = evaluate_cases(
            arguments.predictions, cohort, cases, conventions, accept_spacing=arguments.accept_spacing
        )
        write_case_table(table, rows)
        scored.append(Scored(rows[0].conventions, summarise(rows)))
        failed = failures(rows)  # the same ones under every convention
    print(format_summary(*scored))
    print(f"cases: {', '.join(map(str, tables.values()))}")
    for line in failed:
        print(f"failed, and scored as such: {line}", file=sys.stderr)
    return 3 if failed else 0


def _require_predictions(folder: Path, cases: Sequence[str]) -> None:
    """Refuse a folder without a single prediction: it is another one that was meant."""
    from trifuse.kernels import DataError

    if not any((folder / f"{case}.nii.gz").exists() for case in cases):
        within = sorted({str(path.parent) for path in folder.glob("predictions/*/*.nii.gz")})
        hint = f"those of this run lie in {' and '.join(within)}" if within else ""
        want = f"<case>.nii.gz for at least one of {count(len(cases), 'case')}, such as {cases[0]}.nii.gz"
        raise DataError(folder, "predictions", got="none", want=want, hint=hint)


def compare(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.evaluation.statistics import compare_runs, format_comparison, write_comparison_table

    if len(arguments.runs) < 2 or (len(arguments.runs) > 2 and not arguments.overlay):
        raise UsageError(f"expected two runs to compare (--overlay shows more), got {len(arguments.runs)}")
    if arguments.overlay:
        _compare_overlay(arguments)
        return
    if arguments.out is not None:
        _refuse_existing(arguments.out, overwrite=False)
    a, b = arguments.runs
    rows = compare_runs(_case_table(a), _case_table(b))
    print(format_comparison(rows, str(a), str(b)))
    if arguments.out is not None:
        write_comparison_table(arguments.out, rows)


def _compare_overlay(arguments: argparse.Namespace) -> None:
    from trifuse.architectures.runs.overlay import compare_overlay

    if arguments.out is None:
        raise UsageError("--overlay draws a picture: say with --out which folder it goes to")
    print(f"picture: {compare_overlay(arguments.runs, arguments.out).png}")


def plot_ecg(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.data.ecg.median_beat import load_beat
    from trifuse.architectures.evaluation.ecg_figures import draw_ecg

    beat = load_beat(arguments.file, rate_hz=arguments.rate, min_beats=arguments.min_beats)
    for note in beat.notes:
        print(f"note: {note}")
    print(f"picture: {draw_ecg(beat, arguments.out, name=arguments.file.stem).png}")


def plot_bullseye(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.taff_unet.bullseye import plot_scar_bullseyes

    options = {} if arguments.angle is None else {"angle_deg": arguments.angle}
    picture, notes = plot_scar_bullseyes(
        arguments.labels,
        arguments.out,
        reference=arguments.reference,
        rv_anterior=arguments.rv_anterior,
        rv_inferior=arguments.rv_inferior,
        rv_class=arguments.rv_class,
        cavity=arguments.cavity,
        wall=arguments.wall,
        scar=arguments.scar,
        of=arguments.of,
        **options,
    )
    for note in notes:
        print(f"note: {note}")
    print(f"picture: {picture.png}")


def ablate_dino_unet(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.dino_unet.ablate import ablate

    _ablate(arguments, words, ablate)


def ablate_fias(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.fias.ablate import ablate

    _ablate(arguments, words, ablate)


def ablate_taff_unet(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.taff_unet.ablate import ablate

    _ablate(arguments, words, partial(ablate, cohort=arguments.cohort, jobs=arguments.jobs))


def _ablate(arguments: argparse.Namespace, words: list[str], ablate: Callable[..., Path]) -> None:
    table = ablate(arguments.out, seeds=arguments.seeds, epochs=arguments.epochs, cases=arguments.cases, command=words)
    print(table.read_text())
    print(f"table: {table}")


def convert_dinov2(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.dino_unet.convert import convert_dinov2

    _convert(arguments, convert_dinov2)


def convert_dilateformer(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.fias.convert import convert_dilateformer

    _convert(arguments, convert_dilateformer)


def convert_nnunet(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.plain_unet.convert import convert_nnunet

    _convert(arguments, convert_nnunet)


def convert_ecg(arguments: argparse.Namespace, words: list[str]) -> None:
    from trifuse.architectures.taff_unet.convert import convert_ecg_dual_attention

    _convert(arguments, convert_ecg_dual_attention)


def doctor(arguments: argparse.Namespace, words: list[str]) -> None:
    import json

    if arguments.model is None:
        from .doctor import examine, format_findings

        findings = examine()
        text = format_findings(findings)
    else:
        from .cost import describe_network, format_network

        findings = describe_network(arguments.model)
        text = format_network(findings)
    print(json.dumps(findings, indent=2) if arguments.json else text)


def bench(arguments: argparse.Namespace, words: list[str]) -> int:
    import subprocess
    from importlib.util import find_spec

    from trifuse.kernels import MissingExtra

    if find_spec("pytest_benchmark") is None:
        raise MissingExtra("pytest-benchmark", "bench", "timing this machine")
    only = ["--only", *arguments.only] if arguments.only else []
    command = [sys.executable, "-m", "trifuse.benchmarks.reporting.report", "--out", str(arguments.out), *only]
    return subprocess.run([*command, "--seconds", str(arguments.seconds)]).returncode


def _convert(arguments: argparse.Namespace, convert: Callable[[Path, Path], Any]) -> None:
    out = arguments.out or arguments.file.with_suffix("")
    _refuse_existing(out / "config.json", arguments.overwrite)
    print(convert(arguments.file, out))
    print(f"weights: {out}")


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already; choose another name, or pass --overwrite where there is one")
    if path.suffix == ".csv":
        _require_folder_of(path)


def _require_folder_of(path: Path) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it first")


def _case_table(path: Path) -> Path:
    """Find the case table of a run's headline, or take the table itself."""
    from trifuse.architectures.evaluation.tables import case_tables

    return case_tables(path)[0] if path.is_dir() else path
