"""Scored rows: nothing dropped, a failure is the worst score, every convention scores what it says."""

from __future__ import annotations

import math
import shutil
import unicodedata
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.volumes.nifti import new_volume, write_labels
from trifuse.architectures.evaluation import scoring
from trifuse.architectures.evaluation.metrics import Conventions, case_metrics, image_diagonal
from trifuse.architectures.evaluation.scoring import EXTRA, MISSING, NOTHING_LABELLED, OK, evaluate_cases, score_case
from trifuse.architectures.evaluation.summary import summarise
from trifuse.kernels import DataError, ShapeError

STRICT = Conventions()


def perfect_predictions(cohort, folder):
    folder.mkdir()
    for case in cohort.cases:
        shutil.copy(case.label, folder / f"{case.case_id}.nii.gz")
    return [case.case_id for case in cohort.cases]


def test_perfect_predictions_score_one(make_cohort, tmp_path):
    cohort = make_cohort("a", "b")
    rows = evaluate_cases(tmp_path / "p", cohort, perfect_predictions(cohort, tmp_path / "p"))
    assert [(r.case_id, r.class_name, r.slice, r.status) for r in rows] == [
        ("a", "foreground", None, OK),
        ("b", "foreground", None, OK),
    ]
    assert all(r.scores["dsc"] == 1 and r.scores["hd95_mm"] == 0 for r in rows)


@pytest.mark.parametrize("value", [2, 255, -1])
def test_d36_values_that_are_no_class_are_refused_and_not_scored_zero(make_cohort, tmp_path, value):
    """Masks of 0 and 255, or the data set's own label values: each file and value is named, and what to pass."""
    cohort = make_cohort("a", "b")
    perfect_predictions(cohort, tmp_path / "p")
    _, truth = load_case(cohort, cohort.cases[1])
    write_labels(tmp_path / "p" / "b.nii.gz", truth.voxels.astype(np.int16) * value, truth)
    with pytest.raises(DataError) as caught:
        evaluate_cases(tmp_path / "p", cohort, ["a", "b"])
    assert str(tmp_path / "p" / "b.nii.gz") in str(caught.value)
    assert f"values: expected class ids: 0 background, 1 foreground, got {value}" in str(caught.value)
    assert "--label-values" in str(caught.value)


def test_d36_predictions_in_the_label_values_of_the_cohort(put_case, tmp_path):
    """They are mapped as the labels are; a value that no target names is background there, too."""
    stored = np.zeros((4, 7, 8), np.uint8)
    stored[1, 2:4, 2:5], stored[1, 4:6, 2:5] = 3, 7
    put_case("a", labels=stored)
    cohort = open_cohort(tmp_path, targets={"wall": 7, "lv": 3})
    (tmp_path / "p").mkdir()
    shutil.copy(cohort.cases[0].label, tmp_path / "p" / "a.nii.gz")
    rows = evaluate_cases(tmp_path / "p", cohort, ["a"], label_values=True)
    assert [(row.class_name, row.scores["dsc"]) for row in rows] == [("wall", 1.0), ("lv", 1.0)]
    with pytest.raises(DataError, match="got 3, 7"):
        evaluate_cases(tmp_path / "p", cohort, ["a"])


@pytest.mark.parametrize(("value", "refused"), [(255, True), (3, False), (7, False)])
def test_a_mask_is_not_taken_for_the_other_values_of_the_cohort(put_case, tmp_path, value, refused):
    """Beside a target all values of the labels are background; 255 is none of them, 7 is."""
    stored = np.zeros((4, 7, 8), np.uint8)
    stored[1, 2:4, 2:5], stored[1, 4:6, 2:5] = 3, 7
    put_case("a", labels=stored)
    cohort = open_cohort(tmp_path, targets={"lv": 3})
    _, truth = load_case(cohort, cohort.cases[0])
    (tmp_path / "p").mkdir()
    write_labels(tmp_path / "p" / "a.nii.gz", truth.voxels * value, truth)
    if refused:
        with pytest.raises(DataError, match=r"a\.nii\.gz: values: expected label values of the cohort.*got 255"):
            evaluate_cases(tmp_path / "p", cohort, ["a"], label_values=True)
    else:
        (row,) = evaluate_cases(tmp_path / "p", cohort, ["a"], label_values=True)
        assert row.scores["dsc"] == (value == 3)


@pytest.mark.parametrize("which", ["prediction", "truth"])
@pytest.mark.parametrize("value", [3, 255, -1])
def test_arrays_with_values_that_are_no_class_are_refused_on_either_side(which, value):
    labels = {"prediction": np.ones((2, 3, 3), int), "truth": np.ones((2, 3, 3), int)}
    labels[which][0, 0, 0] = value
    with pytest.raises(ValueError, match=f"{which}: expected class ids below 3, got {value}$"):
        score_case(
            **labels,
            spacing_mm=(1, 1, 1),
            class_names=["background", "a", "b"],
            conventions=Conventions(),
            case_id="x",
            patient="x",
        )


def test_scores_are_those_of_the_arrays_in_mm(make_cohort, tmp_path):
    cohort = make_cohort("a")
    _, truth = load_case(cohort, cohort.cases[0])
    moved = np.roll(truth.voxels, 2, axis=1)
    (tmp_path / "p").mkdir()
    write_labels(tmp_path / "p" / "a.nii.gz", moved, truth)
    (scored,) = evaluate_cases(tmp_path / "p", cohort, ["a"])
    assert truth.spacing_mm == (8.0, 1.5, 1.25)
    assert scored.scores == case_metrics(moved, truth.voxels, (8.0, 1.5, 1.25))
    assert scored.scores["hd95_mm"] == pytest.approx(3.0)  # two rows of 1.5 mm


def test_l11_missing_and_extra_predictions_count_as_failures(make_cohort, tmp_path):
    cohort = make_cohort("a", "b", "c")
    predictions = tmp_path / "p"
    perfect_predictions(cohort, predictions)
    (predictions / "b.nii.gz").rename(predictions / "B_final.nii.gz")
    rows = {r.case_id: r for r in evaluate_cases(predictions, cohort, ["a", "b"])}
    assert set(rows) == {"a", "b", "B_final"}  # c is a case of the cohort that was not asked for
    assert rows["b"].status == MISSING
    assert rows["B_final"].status == EXTRA
    assert rows["b"].failed
    assert rows["B_final"].failed
    assert not rows["a"].failed
    assert [rows[name].scores["dsc"] for name in ("a", "b", "B_final")] == [1, 0, 0]
    assert rows["b"].scores["hd95_mm"] == pytest.approx(image_diagonal((4, 20, 24), (8.0, 1.5, 1.25)))
    (dsc,) = [s for s in summarise(list(rows.values())) if s.metric == "dsc"]
    assert (dsc.mean, dsc.count, dsc.undefined) == (pytest.approx(1 / 3), 3, 0)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_d27_a_prediction_is_of_its_case_in_either_form_of_its_accents_and_no_extra_one(make_cohort, tmp_path, form):
    cohort = make_cohort("é")
    ids = perfect_predictions(cohort, tmp_path / "p")
    (tmp_path / "p" / f"{ids[0]}.nii.gz").rename(tmp_path / "p" / f"{unicodedata.normalize(form, ids[0])}.nii.gz")
    assert [(row.case_id, row.status) for row in evaluate_cases(tmp_path / "p", cohort, ids)] == [("é", OK)]


def test_l11_a_missing_prediction_of_an_empty_case_is_still_a_failure(make_cohort, tmp_path):
    cohort = make_cohort("a", empty=True)
    (scored,) = evaluate_cases(tmp_path, cohort, ["a"])
    assert (scored.status, scored.scores["dsc"]) == (MISSING, 0)


def test_l11_a_missing_prediction_is_as_far_off_as_a_slice_allows_where_slices_are_scored(make_cohort, tmp_path):
    rows = evaluate_cases(tmp_path, make_cohort("a"), ["a"], Conventions(aggregation="slice"))
    assert [(row.slice, row.status) for row in rows] == [(number, MISSING) for number in range(4)]
    assert [row.scores["hd95_mm"] for row in rows] == [pytest.approx(image_diagonal((20, 24), (1.5, 1.25)))] * 4


@pytest.mark.parametrize(
    ("damage", "said"),
    [("truncate", "gzip stream"), ("shape", "shape"), ("affine", "affine"), ("float", "labels"), ("text", "content")],
)
def test_an_unusable_prediction_is_a_failure_and_says_why(make_cohort, tmp_path, damage, said):
    cohort = make_cohort("a", "b")
    ids = perfect_predictions(cohort, tmp_path / "p")
    path = tmp_path / "p" / "a.nii.gz"
    image = nib.load(path)
    voxels, affine = np.asarray(image.dataobj), image.affine
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "text":
        path.write_text("not found")
    elif damage == "shape":
        nib.save(nib.Nifti1Image(voxels[:, :, 1:], affine), path)
    elif damage == "affine":
        nib.save(nib.Nifti1Image(voxels, affine @ np.diag([1, 1, 2, 1])), path)
    else:
        nib.save(nib.Nifti1Image(voxels * 0.7, affine), path)
    rows = {r.case_id: r for r in evaluate_cases(tmp_path / "p", cohort, ids)}
    assert rows["a"].status == f"unusable prediction: {said}"
    assert rows["a"].scores["dsc"] == 0
    assert str(tmp_path) not in rows["a"].status
    assert rows["b"].scores["dsc"] == 1


@pytest.mark.parametrize("aggregation", ["volume", "slice"])
@pytest.mark.parametrize("slices", ["all", "labelled"])
def test_per_volume_and_per_slice_over_all_and_labelled_slices(aggregation, slices):
    truth = np.zeros((5, 6, 6), np.uint8)
    truth[1:4, 1:3, 1:3] = 1
    pred = truth.copy()
    pred[4] = 1  # a false slice where nothing is labelled
    chosen = Conventions(aggregation=aggregation, slices=slices)
    rows = score_case(pred, truth, (8, 2, 1), ("bg", "atrium"), chosen, case_id="a", patient="a")
    scored = {r.slice: r.scores["dsc"] for r in rows}
    want = {
        ("volume", "all"): {None: 2 * 12 / (12 + 48)},
        ("volume", "labelled"): {None: 1.0},
        ("slice", "all"): {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 0.0},
        ("slice", "labelled"): {1: 1.0, 2: 1.0, 3: 1.0},
    }
    assert scored == pytest.approx(want[aggregation, slices])
    if aggregation == "slice" and slices == "all":
        assert rows[4].scores["volume_difference_ml"] == pytest.approx(36 * 16 / 1000)
        assert rows[4].scores["hd95_mm"] == pytest.approx(math.hypot(12, 6))


def test_leaving_slices_out_does_not_bring_the_others_closer():
    truth = np.zeros((5, 4, 4), np.uint8)
    truth[0] = truth[4] = 1
    pred = np.zeros_like(truth)
    pred[0] = 1
    labelled = Conventions(slices="labelled")
    (scored,) = score_case(pred, truth, (10, 1, 1), ("bg", "atrium"), labelled, case_id="a", patient="a")
    assert scored.scores["hd95_mm"] == pytest.approx(40)


def test_labelled_slices_are_those_on_which_anything_was_drawn(make_cohort, tmp_path):
    """Slices with another structure's contour count; slices that nobody looked at do not."""
    cohort = make_cohort("a")
    _, truth = load_case(cohort, cohort.cases[0])
    raw = truth.voxels * 3
    raw[0] = 2  # another structure, drawn on the first slice
    write_labels(cohort.cases[0].label, raw, truth)
    cohort = open_cohort(cohort.root, "plain", targets=3)
    (tmp_path / "p").mkdir()
    write_labels(tmp_path / "p" / "a.nii.gz", np.ones_like(truth.voxels), truth)
    rows = evaluate_cases(tmp_path / "p", cohort, ["a"], Conventions(aggregation="slice", slices="labelled"))
    assert [r.slice for r in rows] == [0, 1, 2]


def test_a_case_without_a_labelled_slice_has_a_row_and_no_score(make_cohort, tmp_path):
    cohort = make_cohort("a", empty=True)
    ids = perfect_predictions(cohort, tmp_path / "p")
    (scored,) = evaluate_cases(tmp_path / "p", cohort, ids, Conventions(slices="labelled"))
    assert scored.status == NOTHING_LABELLED
    assert math.isnan(scored.scores["dsc"])
    assert not scored.failed


def test_d14_metrics_refuse_a_spacing_that_is_hard_to_believe(make_cohort, tmp_path):
    cohort = make_cohort("a", "b")
    label = cohort.case("a").label
    for path in (cohort.case("a").image, label):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([1e-3, 1e-3, 1e-3, 1])), path)
    ids = perfect_predictions(cohort, tmp_path / "p")
    with pytest.raises(DataError, match=r"(?s)a\.nii\.gz: spacing.*accept_spacing=True") as caught:
        evaluate_cases(tmp_path / "p", cohort, ids)
    assert "b.nii.gz" not in str(caught.value)
    assert len(evaluate_cases(tmp_path / "p", cohort, ids, accept_spacing=True)) == 2


def test_truth_problems_are_all_named_at_once(make_cohort, tmp_path):
    cohort = make_cohort("a", "b", "c")
    for name in ("a", "c"):
        cohort.case(name).label.write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)2 problems.*a\.nii\.gz.*c\.nii\.gz"):
        evaluate_cases(tmp_path, cohort, ["a", "b", "c"])


def test_t19_nothing_to_evaluate(make_cohort, tmp_path):
    cohort = make_cohort("a")
    with pytest.raises(DataError, match="0 cases asked for"):
        evaluate_cases(tmp_path, cohort, [])
    with pytest.raises(DataError, match="no such case"):
        evaluate_cases(tmp_path, cohort, ["a", "z"])
    shutil.rmtree(cohort.root / "labels")
    with pytest.raises(DataError, match="a: label: expected a label to score against"):
        evaluate_cases(tmp_path, open_cohort(cohort.root, "plain"), ["a"])


def test_scores_of_several_classes_are_kept_apart():
    truth = np.zeros((2, 4, 4), np.uint8)
    truth[:, :2], truth[:, 2:] = 1, 2
    pred = np.where(truth == 2, 0, truth).astype(np.uint8)
    rows = score_case(pred, truth, (1, 1, 1), ("bg", "one", "two"), STRICT, case_id="a", patient="p")
    assert {r.class_name: r.scores["dsc"] for r in rows} == {"one": 1, "two": 0}
    with pytest.raises(ShapeError):
        score_case(pred[:, :3], truth, (1, 1, 1), ("bg", "one", "two"), STRICT, case_id="a", patient="p")


def test_predictions_are_read_one_at_a_time(make_cohort, tmp_path, monkeypatch):
    cohort = make_cohort("a", "b", "c")
    ids = perfect_predictions(cohort, tmp_path / "p")
    alive, most = [], []
    score = scoring.score_case

    def watch(prediction, *args, **kwargs):
        import weakref

        alive.append(weakref.ref(prediction))
        most.append(sum(one() is not None for one in alive))
        return score(prediction, *args, **kwargs)

    monkeypatch.setattr(scoring, "score_case", watch)
    evaluate_cases(tmp_path / "p", cohort, ids)
    assert len(most) == 3
    assert max(most) <= 2  # the last one may linger until it is replaced


def test_new_volume_is_what_the_fixture_thinks(make_cohort):
    image, _ = load_case(make_cohort("a"), make_cohort("a").cases[0])
    assert image.voxels.shape == (4, 20, 24)
    assert new_volume(np.zeros((2, 3, 4), np.uint8), np.eye(4)).voxels.size == 24


@pytest.mark.parametrize("convention", ["strict", "transunet"])
def test_a_cohort_without_spacings_is_scored_in_voxels(make_cohort, tmp_path, convention):
    cohort = replace(make_cohort("a", "b"), has_spacing=False)
    _, truth = load_case(cohort, cohort.cases[0])
    (tmp_path / "p").mkdir()
    write_labels(tmp_path / "p" / "a.nii.gz", np.roll(truth.voxels, 2, axis=1), truth)
    moved, missing = evaluate_cases(tmp_path / "p", cohort, ["a", "b"], Conventions(convention))
    for scored in (moved, missing):
        assert set(scored.scores) == set(scored.conventions.metrics)
        assert not any(name.endswith(("_mm", "_ml")) for name in scored.scores)
        assert "mm" not in scored.conventions.describe()
    assert moved.scores["hd95_vox"] == 2.0  # not the 3 mm of a cohort that knows its spacing
    assert moved.scores["volume_difference_vox"] == 0
    assert missing.scores["hd95_vox"] == pytest.approx(image_diagonal((4, 20, 24)))
