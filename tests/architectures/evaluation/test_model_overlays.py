"""Several models on one sheet: which cases, which slices, whose DSC on which tile, and what is missing."""

from __future__ import annotations

import csv
import shutil
from itertools import pairwise

import numpy as np
import pytest

from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.volumes.nifti import read_labels, write_labels
from trifuse.architectures.evaluation import model_overlays
from trifuse.architectures.evaluation.model_overlays import collect_model_tiles, draw_model_overlays
from trifuse.architectures.evaluation.overlays import LONGEST_HEADING, Tile
from trifuse.kernels import DataError

NAMES = ("background", "aorta", "gallbladder", "liver", "spleen", "stomach")


def squares(count: int) -> Tile:
    """Return a tile with as many squares, each one pixel off in the prediction."""
    truth = np.zeros((40, 100), np.uint8)
    for k in range(count):
        truth[10:20, 10 * k + 11 : 10 * k + 19] = k + 1
    return Tile("case", "", 0, 1, truth * 1.0, truth, np.roll(truth, 1, 0), (1.0, 1.0), 0.9)


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures that are saved."""
    drawn = []
    save = model_overlays.save_picture

    def keep(figure, *args):
        drawn.append(figure)
        return save(figure, *args)

    monkeypatch.setattr(model_overlays, "save_picture", keep)
    return drawn


def predict(cohort, folder, shifts):
    """Write, for each case, its truth moved by some rows: the further, the worse."""
    folder.mkdir(parents=True)
    for case_id, rows in shifts.items():
        _, truth = load_case(cohort, cohort.case(case_id))
        write_labels(folder / f"{case_id}.nii.gz", np.roll(truth.voxels, rows, 1), truth)
    return folder


@pytest.fixture
def cohort(make_cohort):
    return make_cohort("a", "b", "c")


@pytest.fixture
def predictions(cohort, tmp_path):
    """One model that is right about a and worst about c; one that has no prediction for b."""
    return {
        "good": predict(cohort, tmp_path / "good", {"a": 0, "b": 1, "c": 3}),
        "bad": predict(cohort, tmp_path / "bad", {"a": 2, "c": 5}),
    }


def test_every_case_has_a_tile_of_each_model_on_the_same_slice(cohort, predictions):
    rows = collect_model_tiles(predictions, cohort, ["a", "b", "c"])
    by_case = {row[0].case_id: row for row in rows}
    assert {case: [tile.slice for tile in row] for case, row in by_case.items()} == {case: [1, 1] for case in "abc"}
    for case, row in by_case.items():
        for folder, tile in zip(predictions.values(), row, strict=True):
            path = folder / f"{case}.nii.gz"
            assert (tile.prediction is None) == (not path.exists())
            if tile.prediction is not None:
                assert np.array_equal(tile.prediction, read_labels(path).voxels[1])
    dsc = {case: [tile.dsc for tile in row] for case, row in by_case.items()}
    assert dsc["a"] == pytest.approx([1.0, 0.8])
    assert dsc["b"] == pytest.approx([0.9, 0.0])
    assert dsc["c"] == pytest.approx([0.7, 0.5])


def test_the_worst_case_of_all_models_together_comes_first(cohort, predictions):
    """By mean DSC: b 0.45, c 0.6, a 0.9. A single model would have had another order."""
    rows = collect_model_tiles(predictions, cohort, ["a", "b", "c"])
    assert [(row[0].case_id, row[0].note) for row in rows] == [("b", "worst"), ("c", "median"), ("a", "best")]
    chosen = collect_model_tiles(predictions, cohort, ["a", "b", "c"], limit=2, slice_index=2)
    assert [(row[0].case_id, row[0].slice) for row in chosen] == [("b", 2), ("a", 2)]


def test_files_of_other_cases_are_left_alone(cohort, predictions):
    shutil.copy(predictions["good"] / "a.nii.gz", predictions["good"] / "stranger.nii.gz")
    assert [row[0].case_id for row in collect_model_tiles(predictions, cohort, ["a"])] == ["a"]
    with pytest.raises(DataError, match="no such case"):
        collect_model_tiles(predictions, cohort, ["stranger"])


def test_the_sheet_shows_image_truth_and_every_model_with_its_dsc(cohort, predictions, tmp_path, figures):
    rows = collect_model_tiles(predictions, cohort, ["a", "b", "c"])
    picture = draw_model_overlays(rows, list(predictions), cohort.class_names, tmp_path / "sheet")
    (figure,) = figures
    assert len(figure.axes) == 3 * 4
    headings = [axis.texts[-1].get_text() for axis in figure.axes[:4]]
    assert headings == ["Image", "Truth", "good", "bad"]
    texts = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    for n, (good, bad) in enumerate([("0.900", "0.000"), ("0.700", "0.500"), ("1.000", "0.800")]):
        assert f"DSC {good}" in texts[4 * n + 2]
        assert f"DSC {bad}" in texts[4 * n + 3]
        assert not any("DSC" in text for text in texts[4 * n] + texts[4 * n + 1])
    assert "no prediction" in texts[3]
    assert sum(text == "no prediction" for axis in texts for text in axis) == 1
    assert picture.png == tmp_path / "sheet" / "model_overlays.png"
    assert "b: good 0.900, bad 0.000; c: good 0.700" in picture.alt
    lines = list(csv.DictReader(picture.csv.open()))
    assert [(line["case_id"], line["model"]) for line in lines[:3]] == [("b", "good"), ("b", "bad"), ("c", "good")]
    assert float(lines[1]["dsc_case"]) == 0
    assert int(lines[1]["pixels_prediction"]) == 0


def test_one_model_s_outlier_is_not_cut_off(tmp_path, figures):
    """The window holds what any of the models predicts."""
    tile, far = squares(1), squares(1)
    far.prediction[:] = 0
    far.prediction[35:39, 95:99] = 1
    draw_model_overlays([[tile, far]], ["one", "other"], NAMES[:2], tmp_path)
    shown = [axis.images[0].get_array().shape for axis in figures[0].axes]
    assert shown == [(40, 100)] * 4


def test_any_number_of_models_with_names_of_any_length(tmp_path, figures):
    name = "taff_unet_$full$_" + "x" * 40
    picture = draw_model_overlays([[squares(5)] * 5], [name] * 5, NAMES, tmp_path)
    assert len(figures[0].axes) == 7
    assert len(figures[0].axes[2].texts[-1].get_text()) == LONGEST_HEADING
    assert next(csv.DictReader(picture.csv.open()))["model"] == name
    renderer = figures[0].canvas.get_renderer()
    spans = [axis.texts[-1].get_window_extent(renderer) for axis in figures[0].axes[2:]]
    assert all(left.x1 < right.x0 for left, right in pairwise(spans))
