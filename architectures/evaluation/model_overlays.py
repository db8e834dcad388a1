"""Several models beside each other: image, truth, and what each predicts, on the same slices of the same cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trifuse.architectures.data.layouts.cohort import Cohort

from .overlays import Tile, choose_cases, cut_tiles, draw_sheet, dsc_text, score_name, tile_numbers
from .picture import Picture, save_picture
from .scoring import evaluate_cases
from .summary import headline_scores, mean_of_defined


def collect_model_tiles(
    predictions: Mapping[str, Path],
    cohort: Cohort,
    case_ids: Sequence[str],
    *,
    limit: int = 6,
    slice_index: int | None = None,
) -> list[list[Tile]]:
    """Choose cases by the DSC that speaks for them, averaged over models; the worst case comes first.

    The same slice is cut for each model.

    Args:
        predictions: a folder of ``<case_id>.nii.gz`` for each model; a case that is missing there scores nothing.
        cohort: where images and labels are.
        case_ids: the cases to choose from.
        limit: how many to choose, see `collect_tiles`.
        slice_index: the slice to show, counted from 0; None takes the most telling one of each case.

    Raises:
        DataError: a case is unknown or has no label, see `evaluate_cases`.
    """
    dsc = [
        headline_scores([row for row in evaluate_cases(folder, cohort, case_ids) if row.case_id in case_ids], "dsc")
        for folder in predictions.values()
    ]
    means = {case_id: mean_of_defined([of_model[case_id] for of_model in dsc]) for case_id in case_ids}
    folders = list(predictions.values())
    return [
        cut_tiles(folders, cohort, case_id, note, [of_model[case_id] for of_model in dsc], slice_index)
        for case_id, note in choose_cases(means, limit)
    ]


def draw_model_overlays(
    rows: Sequence[Sequence[Tile]],
    names: Sequence[str],
    class_names: Sequence[str],
    out: Path,
    *,
    title: str = "Models beside the truth",
) -> Picture:
    """Draw one row per case, image, truth and each model with its DSC on it, into ``out/model_overlays.png``.

    Args:
        rows: for each case a tile of every model, e.g. from `collect_model_tiles`.
        names: of the models, in the order of the tiles.
        class_names: names of the class ids, the background first.
        out: folder to write into.
        title: of the picture.
    """
    figure = draw_sheet(rows, names, class_names)
    header = ["model", "case_id", "slice", "class_name", "pixels_truth", "pixels_prediction", "dsc_slice", "dsc_case"]
    lines = [
        [name, *line]
        for row in rows
        for name, tile in zip(names, row, strict=True)
        for line in tile_numbers(tile, class_names)
    ]
    cases = "; ".join(
        f"{row[0].case_id}: " + ", ".join(f"{n} {dsc_text(t.dsc)}" for n, t in zip(names, row, strict=True))
        for row in rows
    )
    alt = (
        f"Overlay sheet of {len(rows)} cases: image, truth, and the predictions of {len(names)} models side by side; "
        f"{score_name(rows[0]) if rows else 'DSC'} of each case: {cases}."
    )
    return save_picture(figure, out, "model_overlays", title, alt, header, lines)
