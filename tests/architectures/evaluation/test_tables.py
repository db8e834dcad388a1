"""Case tables: nothing dropped, conventions in each line, numbers that survive any locale."""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from trifuse.architectures.data.cases import load_case, open_study
from trifuse.architectures.data.nifti import new_volume, write_labels
from trifuse.architectures.evaluation import tables
from trifuse.architectures.evaluation.metrics import Conventions, case_metrics, image_diagonal
from trifuse.architectures.evaluation.tables import (
    EXTRA,
    MEAN_OF_CLASSES,
    MISSING,
    NOTHING_LABELLED,
    OK,
    Row,
    evaluate_cases,
    format_summary,
    read_case_table,
    score_case,
    summarise,
    write_case_table,
    write_summary_table,
)
from trifuse.kernels import DataError, ShapeError

STRICT = Conventions()


def row(case_id: str, dsc: float, *, class_name: str = "atrium", index: int | None = None, **scores: float) -> Row:
    values = {metric: scores.get(metric, dsc) for metric in STRICT.metrics}
    return Row(case_id, case_id, class_name, index, OK, values, STRICT)


def perfect_predictions(study, folder):
    folder.mkdir()
    for case in study.cases:
        shutil.copy(case.label, folder / f"{case.case_id}.nii.gz")
    return [case.case_id for case in study.cases]


def test_perfect_predictions_score_one(make_study, tmp_path):
    study = make_study("a", "b")
    rows = evaluate_cases(tmp_path / "p", study, perfect_predictions(study, tmp_path / "p"))
    assert [(r.case_id, r.class_name, r.slice, r.status) for r in rows] == [
        ("a", "foreground", None, OK),
        ("b", "foreground", None, OK),
    ]
    assert all(r.scores["dsc"] == 1 and r.scores["hd95_mm"] == 0 for r in rows)


def test_scores_are_those_of_the_arrays_in_mm(make_study, tmp_path):
    study = make_study("a")
    _, truth = load_case(study, study.cases[0])
    moved = np.roll(truth.voxels, 2, axis=1)
    (tmp_path / "p").mkdir()
    write_labels(tmp_path / "p" / "a.nii.gz", moved, truth)
    (scored,) = evaluate_cases(tmp_path / "p", study, ["a"])
    assert truth.spacing_mm == (8.0, 1.5, 1.25)
    assert scored.scores == case_metrics(moved, truth.voxels, (8.0, 1.5, 1.25))
    assert scored.scores["hd95_mm"] == pytest.approx(3.0)  # two rows of 1.5 mm


def test_l11_missing_and_extra_predictions_count_as_failures(make_study, tmp_path):
    study = make_study("a", "b", "c")
    predictions = tmp_path / "p"
    perfect_predictions(study, predictions)
    (predictions / "b.nii.gz").rename(predictions / "B_final.nii.gz")
    rows = {r.case_id: r for r in evaluate_cases(predictions, study, ["a", "b"])}
    assert set(rows) == {"a", "b", "B_final"}  # c is a case of the study that was not asked for
    assert rows["b"].status == MISSING
    assert rows["B_final"].status == EXTRA
    assert rows["b"].failed
    assert rows["B_final"].failed
    assert not rows["a"].failed
    assert [rows[name].scores["dsc"] for name in ("a", "b", "B_final")] == [1, 0, 0]
    assert rows["b"].scores["hd95_mm"] == pytest.approx(image_diagonal((4, 20, 24), (8.0, 1.5, 1.25)))
    (dsc,) = [s for s in summarise(list(rows.values())) if s.metric == "dsc"]
    assert (dsc.mean, dsc.count, dsc.undefined) == (pytest.approx(1 / 3), 3, 0)


def test_l11_a_missing_prediction_of_an_empty_case_is_still_a_failure(make_study, tmp_path):
    study = make_study("a", empty=True)
    (scored,) = evaluate_cases(tmp_path, study, ["a"])
    assert (scored.status, scored.scores["dsc"]) == (MISSING, 0)


@pytest.mark.parametrize(
    ("damage", "said"),
    [("truncate", "gzip stream"), ("shape", "shape"), ("affine", "affine"), ("float", "labels"), ("text", "content")],
)
def test_an_unusable_prediction_is_a_failure_and_says_why(make_study, tmp_path, damage, said):
    study = make_study("a", "b")
    ids = perfect_predictions(study, tmp_path / "p")
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
    rows = {r.case_id: r for r in evaluate_cases(tmp_path / "p", study, ids)}
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


def test_labelled_slices_are_those_on_which_anything_was_drawn(make_study, tmp_path):
    """Slices with another structure's contour count; slices that nobody looked at do not."""
    study = make_study("a")
    _, truth = load_case(study, study.cases[0])
    raw = truth.voxels * 3
    raw[0] = 2  # another structure, drawn on the first slice
    write_labels(study.cases[0].label, raw, truth)
    study = open_study(study.root, "plain", targets=3)
    (tmp_path / "p").mkdir()
    write_labels(tmp_path / "p" / "a.nii.gz", np.ones_like(truth.voxels), truth)
    rows = evaluate_cases(tmp_path / "p", study, ["a"], Conventions(aggregation="slice", slices="labelled"))
    assert [r.slice for r in rows] == [0, 1, 2]


def test_a_case_without_a_labelled_slice_has_a_row_and_no_score(make_study, tmp_path):
    study = make_study("a", empty=True)
    ids = perfect_predictions(study, tmp_path / "p")
    (scored,) = evaluate_cases(tmp_path / "p", study, ids, Conventions(slices="labelled"))
    assert scored.status == NOTHING_LABELLED
    assert math.isnan(scored.scores["dsc"])
    assert not scored.failed


def test_d14_metrics_refuse_a_spacing_that_is_hard_to_believe(make_study, tmp_path):
    study = make_study("a", "b")
    label = study.case("a").label
    for path in (study.case("a").image, label):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([1e-3, 1e-3, 1e-3, 1])), path)
    ids = perfect_predictions(study, tmp_path / "p")
    with pytest.raises(DataError, match=r"(?s)a\.nii\.gz: spacing.*accept_spacing=True") as caught:
        evaluate_cases(tmp_path / "p", study, ids)
    assert "b.nii.gz" not in str(caught.value)
    assert len(evaluate_cases(tmp_path / "p", study, ids, accept_spacing=True)) == 2


def test_truth_problems_are_all_named_at_once(make_study, tmp_path):
    study = make_study("a", "b", "c")
    for name in ("a", "c"):
        study.case(name).label.write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)2 problems.*a\.nii\.gz.*c\.nii\.gz"):
        evaluate_cases(tmp_path, study, ["a", "b", "c"])


def test_t19_nothing_to_evaluate(make_study, tmp_path):
    study = make_study("a")
    with pytest.raises(DataError, match="0 cases asked for"):
        evaluate_cases(tmp_path, study, [])
    with pytest.raises(DataError, match="no such case"):
        evaluate_cases(tmp_path, study, ["a", "z"])
    shutil.rmtree(study.root / "labels")
    with pytest.raises(DataError, match="a: label: expected a label to score against"):
        evaluate_cases(tmp_path, open_study(study.root, "plain"), ["a"])


def test_t19_the_spread_of_one_case_is_undefined():
    (dsc, *_) = summarise([row("a", 0.8)])
    assert (dsc.mean, dsc.count) == (0.8, 1)
    assert math.isnan(dsc.sd)


def test_summary_is_mean_and_sample_deviation_of_what_is_defined():
    rows = [row("a", 0.8), row("b", 0.9), row("c", 1.0, sensitivity=math.nan)]
    summaries = {s.metric: s for s in summarise(rows)}
    assert summaries["dsc"].mean == pytest.approx(0.9)
    assert summaries["dsc"].sd == pytest.approx(0.1)  # n - 1; the population's would be 0.0816
    assert (summaries["sensitivity"].count, summaries["sensitivity"].undefined) == (2, 1)
    assert summaries["sensitivity"].mean == pytest.approx(0.85)
    undefined = summarise([row("a", math.nan)])[0]
    assert math.isnan(undefined.mean)
    assert (undefined.count, undefined.undefined) == (0, 1)


def test_several_classes_also_get_the_mean_of_their_means():
    rows = [row("a", 0.8), row("a", 0.4, class_name="scar"), row("b", 0.9), row("b", math.nan, class_name="scar")]
    dsc = {s.class_name: s for s in summarise(rows) if s.metric == "dsc"}
    assert dsc["atrium"].mean == pytest.approx(0.85)
    assert dsc["scar"].mean == pytest.approx(0.4)
    assert dsc[MEAN_OF_CLASSES].mean == pytest.approx((0.85 + 0.4) / 2)  # over cases first, then over classes
    assert dsc[MEAN_OF_CLASSES].sd == pytest.approx(np.std([0.6, 0.9], ddof=1))


def test_scores_of_several_classes_are_kept_apart():
    truth = np.zeros((2, 4, 4), np.uint8)
    truth[:, :2], truth[:, 2:] = 1, 2
    pred = np.where(truth == 2, 0, truth).astype(np.uint8)
    rows = score_case(pred, truth, (1, 1, 1), ("bg", "one", "two"), STRICT, case_id="a", patient="p")
    assert {r.class_name: r.scores["dsc"] for r in rows} == {"one": 1, "two": 0}
    with pytest.raises(ShapeError):
        score_case(pred[:, :3], truth, (1, 1, 1), ("bg", "one", "two"), STRICT, case_id="a", patient="p")


def test_summary_as_text_names_its_conventions_and_what_it_left_out():
    rows = [row("a", 0.8, sensitivity=math.nan), row("b", 0.9, hd95_mm=12.345)]
    lines = format_summary(summarise(rows), STRICT).splitlines()
    assert lines[0] == STRICT.describe()
    assert lines[2].split()[:5] == ["Mean", "±", "SD", "n", "DSC"]
    assert lines[3].startswith("atrium     2  0.850 ± 0.071")
    assert "0.900 ± -" in lines[3]
    assert lines[-1] == "Sensitivity of atrium: 1 of 2 undefined and left out of the mean."


def test_table_survives_the_disk(tmp_path):
    rows = [row("a b", 1 / 3), row('ü,"x"', math.nan, index=4)]
    write_case_table(tmp_path / "t.csv", rows)
    back = read_case_table(tmp_path / "t.csv")
    assert [(r.case_id, r.slice, r.conventions) for r in back] == [(r.case_id, r.slice, r.conventions) for r in rows]
    assert back[0].scores["dsc"] == 1 / 3
    assert math.isnan(back[1].scores["dsc"])
    with open(tmp_path / "t.csv", newline="") as stream:
        (first, _) = csv.DictReader(stream)
    assert "empty_masks=strict" in first["conventions"]
    assert "hd_unit=mm" in first["conventions"]


def test_t22_decimals_have_a_dot_whatever_the_locale(tmp_path):
    """LC_ALL asks for German; and since no German locale may be installed, localeconv is made to say comma too."""
    script = """
import locale, sys
from pathlib import Path
try:
    locale.setlocale(locale.LC_ALL, "")
except locale.Error:
    pass
locale.localeconv = lambda: {"decimal_point": ",", "thousands_sep": ".", "grouping": [3, 0]}
locale.str = lambda value: str(value).replace(".", ",")
from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.tables import Row, summarise, write_case_table, write_summary_table
conventions = Conventions()
row = Row("a", "a", "atrium", None, "ok", dict.fromkeys(conventions.metrics, 1234.5), conventions)
write_case_table(Path(sys.argv[1]) / "cases.csv", [row])
write_summary_table(Path(sys.argv[1]) / "summary.csv", summarise([row]), conventions)
"""
    environment = {**os.environ, "LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True, timeout=120)
    assert ",1234.5,1234.5," in (tmp_path / "cases.csv").read_text()
    assert "atrium,dsc,1234.5,nan,1,0," in (tmp_path / "summary.csv").read_text()


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    write_case_table(path, [row("a", 0.5)])
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_case_table(path, [row("a", 0.6)])
    with pytest.raises(OSError, match="No space"):
        write_summary_table(tmp_path / "s.csv", summarise([row("a", 0.6)]), STRICT)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", "no rows"),
        (lambda text: text.splitlines()[0] + "\n", "no rows"),
        (lambda text: text.replace("empty_masks=strict", "empty_masks=kind"), "does not name the conventions"),
        (lambda text: text + text.splitlines()[1].replace("strict", "nnunet") + "\n", "2 of them"),
        (lambda text: text.replace(",iou,", ",jaccard,"), "none called iou"),
        (lambda text: text.replace("0.5", '"0,5"', 1), "decimal dot"),
        (lambda text: "hello\nworld\n", "conventions"),
    ],
)
def test_read_rejects(tmp_path, damage, said):
    path = tmp_path / "t.csv"
    write_case_table(path, [row("a", 0.5)])
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=said) as caught:
        read_case_table(path)
    assert "t.csv" in str(caught.value)


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.csv"):
        read_case_table(tmp_path / "nothing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.csv"):
        read_case_table(tmp_path / "binary.csv")


def test_predictions_are_read_one_at_a_time(make_study, tmp_path, monkeypatch):
    study = make_study("a", "b", "c")
    ids = perfect_predictions(study, tmp_path / "p")
    alive, most = [], []
    score = tables.score_case

    def watch(prediction, *args, **kwargs):
        import weakref

        alive.append(weakref.ref(prediction))
        most.append(sum(one() is not None for one in alive))
        return score(prediction, *args, **kwargs)

    monkeypatch.setattr(tables, "score_case", watch)
    evaluate_cases(tmp_path / "p", study, ids)
    assert len(most) == 3
    assert max(most) <= 2  # the last one may linger until it is replaced


def test_new_volume_is_what_the_fixture_thinks(make_study):
    image, _ = load_case(make_study("a"), make_study("a").cases[0])
    assert image.voxels.shape == (4, 20, 24)
    assert new_volume(np.zeros((2, 3, 4), np.uint8), np.eye(4)).voxels.size == 24
