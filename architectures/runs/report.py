"""What a finished run leaves: predictions, scores, pictures, and the report over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from trifuse.architectures.data.samples.patch_dataset import PatchDataset
from trifuse.architectures.data.samples.slice_dataset import SliceDataset
from trifuse.architectures.evaluation.bland_altman import draw_agreement
from trifuse.architectures.evaluation.charts import draw_training_curves
from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.overlays import collect_tiles, draw_overlays
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.evaluation.predict import predict_cases
from trifuse.architectures.evaluation.protocols import Protocol
from trifuse.architectures.evaluation.report import (
    Evaluation,
    PaperTable,
    describe_data,
    describe_environment,
    describe_network,
    format_seconds,
    write_report,
)
from trifuse.architectures.evaluation.scoring import evaluate_cases
from trifuse.architectures.storage.best_epoch import BestEpoch
from trifuse.architectures.storage.epoch_log import read_log

from .folder import BEST_FOLDER, FIGURES_FOLDER, LOG_FILE, PREDICTIONS_FOLDER
from .prepared_data import Part, PreparedData
from .recipes import DataRecipe
from .run_description import describe_compilation
from .sessions import earlier_commands

_PART_TITLES = {"train": "Training cases", "val": "Validation cases", "test": "Test cases"}


def parts_to_report(out: Path, parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the parts that are asked for, and those that a run reported before: they would be of other weights."""
    reported = [part for part in get_args(Part) if (out / f"{part}_cases.csv").exists()]
    return tuple(dict.fromkeys([*parts, *reported]))


def report_run(
    out: Path,
    model: nn.Module,
    data: PreparedData,
    *,
    title: str,
    parts: Sequence[Part] = ("test",),
    command: Sequence[str] = (),
    protocol: Protocol | None = None,
    per_slice: bool = False,
    mark: str = "",
    facts: Mapping[str, str] | None = None,
    draw: Callable[[Path, Evaluation, Path], Sequence[Picture]] = lambda log, scored, folder: (),
    decisions: Sequence[str] = (),
    paper_tables: Sequence[PaperTable] = (),
    paper: str = "",
) -> Path:
    """Predict, score and describe what a finished run can do; return the path of its report.

    Args:
        out: the run's folder, with ``log.csv``; predictions go to ``predictions/<part>/``, pictures to ``figures/``.
        model: the network, with the weights to judge.
        data: what it was trained on.
        title: of the report.
        parts: of the split to score, the headline first; a part without cases is left out, and where none is left
            those that were scored after every epoch are.
        command: the command line that does the run again.
        protocol: how the publication scored, shown beside the strict scores, which give the headline.
        per_slice: also score each slice by itself.
        mark: what the title of every table and of every overlay has to say.
        facts: more facts about the run.
        draw: draws what only this network has, from the log and the scores of the headline into a folder.
        decisions: the section on what the run had to settle.
        paper_tables: what the publication reports.
        paper: how to cite it.
    """
    scored = data.scored(parts)
    evaluations, pictures = [], []
    figures = out / FIGURES_FOLDER
    for part in scored:
        found = _predict_and_score(out, model, data, part, protocol, per_slice=per_slice, mark=mark)
        evaluations += found
        tiles = collect_tiles(out / PREDICTIONS_FOLDER / part, data.cohort, found[0].rows)
        heading = _marked(f"{_PART_TITLES[part]}: predictions beside the truth", mark)
        pictures.append(draw_overlays(tiles, data.cohort.class_names, figures / part, title=heading))
        heading = _marked(f"{_PART_TITLES[part]}: agreement of volumes", mark)
        pictures += filter(None, [draw_agreement(found[0].rows, figures / part, title=heading)])
    log = out / LOG_FILE
    curves = draw_training_curves(log, figures, BestEpoch.read(out / BEST_FOLDER), trained_on=not data.split.val)
    return write_report(
        out,
        title=title,
        evaluations=evaluations,
        pictures=[*pictures, curves, *draw(log, evaluations[0], figures)],
        facts=_facts(out, model, data, facts or {}),
        command=command,
        earlier=earlier_commands(out),
        decisions=decisions,
        paper_tables=paper_tables,
        paper=paper,
    )


def _facts(out: Path, model: nn.Module, data: PreparedData, own: Mapping[str, str]) -> dict[str, str]:
    """Return what a report states about a run: its data, its network, its training, its ``own`` facts, where it ran."""
    epochs = read_log(out / LOG_FILE)
    chosen = BestEpoch.read(out / BEST_FOLDER).words(f"the {data.validated_on} cases", len(epochs))
    return {
        **describe_data(data.cohort, {part: data.cases_of(part) for part in get_args(Part)}),
        "Slices": _describe_slices(data.train_set, data.recipe),
        "Augmentation": data.recipe.augmentation.describe(data.recipe.augment),
        **describe_network(model),
        "Chosen": chosen if data.split.val else f"{chosen}; no case validates",
        "Training time": format_seconds(sum(row["seconds"] for row in epochs)),
        **describe_compilation(out),
        **own,
        **describe_environment(next(model.parameters()).device),
    }


def _describe_slices(train_set: SliceDataset | PatchDataset, recipe: DataRecipe) -> str:
    size = recipe.preprocessing.image_size
    side = f"{size}x{size} pixels"
    if isinstance(train_set, SliceDataset):
        return f"{len(train_set)} to train on, resized to {side}"
    rows, columns = train_set.spacing_mm
    pixels = f"pixels of {rows:.3g} x {columns:.3g} mm"
    return f"{train_set.len_slices} to train on, of {pixels}, seen in {len(train_set)} patches of {side} an epoch"


def _marked(title: str, mark: str) -> str:
    return f"{title} ({mark})" if mark else title


def _predict_and_score(
    out: Path,
    model: nn.Module,
    data: PreparedData,
    part: Part,
    protocol: Protocol | None,
    *,
    per_slice: bool,
    mark: str,
) -> list[Evaluation]:
    """Predict a part of the split, and score it per volume and in the other ways that the report shows."""
    folder, recipe = out / PREDICTIONS_FOLDER / part, data.recipe
    predict_cases(
        model,
        data.cohort,
        data.cases_of(part),
        folder,
        recipe.preprocessing,
        side_inputs=data.side_inputs,
        replace=True,  # the folder is the run's own, and a run that was trained longer has another network
    )

    conventions = [Conventions(), *([protocol.conventions] if protocol else [])]

    def scored(name: str, title: str, **choices: Any) -> Evaluation:
        rows, *beside = (
            evaluate_cases(folder, data.cohort, data.cases_of(part), replace(each, **choices)) for each in conventions
        )
        return Evaluation(name, _marked(f"{_PART_TITLES[part]}, {title}", mark), rows, beside, protocol)

    labelled = recipe.slices == "labelled"
    slices = "labelled" if labelled else "all"
    evaluations = [scored(part, "per volume")]
    if labelled:
        evaluations.append(scored(f"{part}_labelled", "labelled slices alone", slices=slices))
    if per_slice:
        evaluations.append(scored(f"{part}_slices", "per slice", aggregation="slice", slices=slices))
    return evaluations
