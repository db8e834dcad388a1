"""``trifuse evaluate``: scores as a run has them, conventions side by side, and folders that were not meant."""

from __future__ import annotations

import csv
import math
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from command import ABDOMEN_TRAINING, run_main

from trifuse.architectures.cli.evaluate import CONVENTIONS, _tables
from trifuse.architectures.data.volumes.nifti import read_labels, write_labels
from trifuse.architectures.evaluation.metrics import EMPTY_MASK_SCORES, Conventions
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.storage.record import read_record, write_record


def test_conventions_are_those_of_the_metrics():
    assert set(CONVENTIONS) == set(EMPTY_MASK_SCORES)


def test_a_convention_that_is_said_twice_has_one_table_where_it_was_asked_for():
    tables = _tables(Namespace(convention=["strict", "strict", "nnunet"], out=Path("scores.csv")))
    assert tables == {"strict": Path("scores.csv"), "nnunet": Path("scores_nnunet.csv")}


def test_predict_evaluate_and_compare(atria_run, atria, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for n in (3, 4):
        shutil.copy(atria / "train_data" / f"train_{n}" / "enhanced.nii.gz", images / f"train_{n}.nii.gz")
    labels = tmp_path / "labels"
    assert run_main(["predict", atria_run, images, "--out", labels], capsys)[0] == 0
    assert (labels / "train_4.nii.gz").read_bytes() == (atria_run / "predictions/test/train_4.nii.gz").read_bytes()

    table = tmp_path / "scores.csv"
    cases = ["--cases", "train_3", "train_4"]
    code, output, errors = run_main(["evaluate", labels, atria, "--out", table, *cases], capsys)
    assert (code, errors) == (0, "")
    assert "left atrium" in output
    headline, tables = output.splitlines()[-2:]
    of_what = "for left atrium, mean ± SD over 2 volumes, empty masks strict."
    assert re.fullmatch(rf"DSC 0\.\d{{3}} ± 0\.\d{{3}} {re.escape(of_what)}", headline)
    assert tables == f"cases: {table}"
    with (atria_run / "test_cases.csv").open() as one, table.open() as two:
        kept = {row["case_id"]: row for row in csv.DictReader(two)}
        (expected,) = csv.DictReader(one)
    assert kept["train_4"]["dsc"] == expected["dsc"]

    manifest = read_record(labels / "predictions.json")
    manifest["images_sha256"]["train_4"] = manifest["images_sha256"]["train_3"]
    write_record(labels / "predictions.json", manifest)
    code, _, errors = run_main(["evaluate", labels, atria, "--out", tmp_path / "other.csv", *cases], capsys)
    assert (code, "1 label map made of other files than the images of" in errors, "train_3" in errors) == (
        0,
        True,
        False,
    )
    assert errors.rstrip().endswith("by predictions.json: train_4")

    (labels / "train_3.nii.gz").unlink()
    code, _, errors = run_main(["evaluate", labels, atria, "--out", tmp_path / "two.csv", *cases], capsys)
    assert code == 3
    assert "train_3 (missing prediction)" in errors

    again = shutil.copytree(atria_run, tmp_path / "again")
    code, output, _ = run_main(["compare", atria_run, again, "--out", tmp_path / "comparison.csv"], capsys)
    assert code == 0
    assert "left atrium" in output
    assert (tmp_path / "comparison.csv").exists()


def test_mistyped_folders_are_refused_before_any_work(atria_run, atria, tmp_path, capsys):
    code, _, errors = run_main(["evaluate", tmp_path / "nowhere", atria, "--out", tmp_path / "x.csv"], capsys)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "is no folder" in errors
    predictions = atria_run / "predictions" / "test"
    code, _, errors = run_main(["evaluate", predictions, atria, "--out", tmp_path / "a" / "x.csv"], capsys)
    assert code == 2
    assert "make it first" in errors
    table = atria_run / "test_cases.csv"
    code, _, errors = run_main(["compare", table, table, "--out", table], capsys)
    assert code == 2
    assert "exists already" in errors


def test_predict_and_evaluate_under_two_conventions(abdomen_run, abdomen, tmp_path, capsys):
    labels = tmp_path / "labels"
    assert run_main(["predict", abdomen_run, abdomen, "--out", labels], capsys)[0] == 0
    (test,) = (abdomen_run / "predictions" / "test").glob("*.nii.gz")
    assert (labels / test.name).read_bytes() == test.read_bytes()
    words = ["evaluate", labels, abdomen, "--label-space", "transunet9", "--cases", test.name.removesuffix(".nii.gz")]
    table = tmp_path / "scores.csv"
    code, output, _ = run_main([*words, "--out", table, "--convention", "strict", "transunet"], capsys)
    assert code == 0
    for said in ("Empty masks `strict`", "Empty masks `transunet`", "HD95, voxels (strict)", "mean of classes"):
        assert said in output
    assert " mm" not in output
    assert table.read_text() == (abdomen_run / "test_cases.csv").read_text()
    beside = tmp_path / "scores_transunet.csv"
    assert beside.read_text() == (abdomen_run / "test_transunet_cases.csv").read_text()
    assert output.endswith(f"\ncases: {table}, {beside}\n")
    table.unlink()
    code, _, errors = run_main([*words, "--out", table, "--convention", "strict", "transunet"], capsys)
    assert (code, table.exists()) == (2, False)
    assert "scores_transunet.csv exists already" in errors
    assert run_main([*words, "--out", table], capsys)[0] == 0
    assert {row.conventions.empty_masks for row in read_case_table(table)} == {"strict"}


def test_folders_that_were_not_meant(abdomen_run, abdomen, tmp_path, capsys):
    words = ["evaluate", abdomen_run, abdomen, "--label-space", "transunet9", "--out", tmp_path / "scores.csv"]
    code, _, errors = run_main(words, capsys)
    assert (code, list(tmp_path.iterdir())) == (3, [])
    assert f"got none; those of this run lie in {abdomen_run / 'predictions' / 'test'}" in errors
    (tmp_path / "run_1").mkdir()
    code, _, errors = run_main(["compare", abdomen_run, tmp_path], capsys)
    assert (code, "choose one of its runs: run_1" in errors) == (3, True)
    code, _, errors = run_main(["compare", abdomen_run, tmp_path / "gone"], capsys)
    assert (code, "a run's folder, got No such file or directory" in errors) == (3, True)
    code, _, errors = run_main(["train", "fias", abdomen, "--out", abdomen, *ABDOMEN_TRAINING], capsys)
    assert (code, "is not empty; choose another folder, new or empty" in errors) == (2, True)
    code, _, errors = run_main(
        ["train", "fias", abdomen, "--out", abdomen_run, *ABDOMEN_TRAINING, "--repeats=2", "--resume"], capsys
    )
    assert (code, "holds a single run, and cannot hold repeated runs as well" in errors) == (2, True)


def test_l5_only_a_table_of_scores_is_replaced(plain_run, scar_cohort, tmp_path, capsys):
    """The table of a study, its label maps, a folder: all of them were replaced, as asked."""
    study = shutil.copytree(scar_cohort, tmp_path / "study")
    words = ["evaluate", plain_run / "predictions" / "test", study, "--cases", "case006", "--overwrite", "--out"]
    label = next(study.glob("seg/case006*"))
    for mine in (study / "cases.csv", label, next(study.glob("lge/case006*")), study / "seg"):
        before = None if mine.is_dir() else mine.read_bytes()
        code, _, errors = run_main([*words, mine], capsys)
        assert (code, "--overwrite replaces a table of scores alone" in errors) == (2, True)
        assert before is None or mine.read_bytes() == before
    assert run_main([*words, tmp_path / "scores.csv"], capsys)[0] == 0
    code, _, errors = run_main([*words[:-2], "--out", tmp_path / "scores.csv"], capsys)
    assert (code, "overwrite" in errors) == (2, False)
    assert run_main([*words, tmp_path / "scores.csv"], capsys)[0] == 0


def test_volume_differences_are_stated_as_asked(plain_run, scar_cohort, tmp_path, capsys):
    words = ["evaluate", plain_run / "predictions" / "test", scar_cohort, "--cases", "case006", "case007"]
    assert run_main([*words, "--out", tmp_path / "a.csv", "--volume", "signed"], capsys)[0] == 0
    assert run_main([*words, "--out", tmp_path / "b.csv", "--volume", "relative"], capsys)[0] == 0
    assert "volume_difference_ml" in (tmp_path / "a.csv").read_text()
    assert "volume_difference_relative" in (tmp_path / "b.csv").read_text()


def test_options_of_an_evaluation_are_those_of_its_scores(put_case, tmp_path, capsys):
    labels = np.zeros((4, 7, 8), np.uint8)
    labels[1:3, 2:5, 2:4] = 1
    put_case("a", labels=labels, affine=np.diag([1e-3, 1e-3, 5e-3, 1]), root=tmp_path / "cohort")
    words = ["evaluate", tmp_path / "cohort" / "labels", tmp_path / "cohort", "--out", tmp_path / "scores.csv"]
    words += ["--voxels", "--per-slice", "--slices", "labelled", "--volume", "signed", "--convention", "nnunet"]
    code, _, errors = run_main(words, capsys)
    assert (code, "--accept-spacing" in errors) == (3, True)
    assert run_main([*words, "--accept-spacing"], capsys)[0] == 0
    rows = read_case_table(tmp_path / "scores.csv")
    assert [row.slice for row in rows] == [1, 2]
    assert rows[0].conventions == Conventions(
        "nnunet", hd_unit="vox", volume="signed", aggregation="slice", slices="labelled"
    )


@pytest.fixture
def label_folders(tmp_path, put_case):
    """Return a folder of predictions and one of label maps, of two cases: one right, one a voxel off."""
    for name in ("a", "b"):
        put_case(name, labels="ball", root=tmp_path)
    (tmp_path / "predictions").mkdir()
    for name, shift in (("a", 0), ("b", 1)):
        truth = read_labels(tmp_path / "labels" / f"{name}.nii.gz")
        write_labels(tmp_path / "predictions" / f"{name}.nii.gz", np.roll(truth.voxels, shift, axis=1), like=truth)
    return tmp_path / "predictions", tmp_path / "labels"


def test_two_folders_of_label_maps(label_folders, tmp_path, capsys):
    table = tmp_path / "scores.csv"
    code, output, errors = run_main(["evaluate", *label_folders, "--out", table, "--target", "ball=1"], capsys)
    assert (code, errors) == (0, "")
    assert "DSC 0.833 ± 0.236 for ball, mean ± SD over 2 volumes" in output
    assert {row.case_id: row.scores["dsc"] for row in read_case_table(table)} == {"a": 1.0, "b": pytest.approx(2 / 3)}
    assert run_main(["evaluate", *label_folders, "--out", tmp_path / "b.csv", "--cases", "b"], capsys)[0] == 0
    assert [row.class_name for row in read_case_table(tmp_path / "b.csv")] == ["label 1"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--label-space", "btcv14"), 2, "--label-space: for a cohort"),
        (("--cases", "z*"), 3, "0 cases that match 'z*'"),
        (("--target", "ball=4"), 3, "target ball: expected values of the truth: 0, 1, got 4 in no label map"),
    ],
)
def test_two_folders_that_cannot_be_scored_leave_nothing(label_folders, tmp_path, capsys, words, code, said):
    command = ["evaluate", *label_folders, "--out", tmp_path / "scores.csv", "--convention", "strict", "monai"]
    got, output, errors = run_main([*command, *words], capsys)
    assert (got, output, said in errors) == (code, "", True), errors
    assert list(tmp_path.glob("*.csv")) == []


def test_l5_a_folder_is_not_scored_against_itself(label_folders, tmp_path, capsys):
    labels = label_folders[1]
    code, _, errors = run_main(["evaluate", labels, labels, "--out", tmp_path / "scores.csv"], capsys)
    assert (code, "got" in errors, "twice" in errors) == (2, True, True)


def test_l6_scipy_is_asked_for_before_a_file_is_read(label_folders, tmp_path, capsys, monkeypatch):
    for path in (*label_folders[0].iterdir(), *label_folders[1].iterdir()):
        path.write_bytes(b"damaged")
    monkeypatch.setitem(sys.modules, "scipy", None)
    code, _, errors = run_main(["evaluate", *label_folders, "--out", tmp_path / "scores.csv"], capsys)
    assert (code, "pip install 'trifuse[med]'" in errors) == (2, True)


def test_a_report_of_two_folders_of_label_maps(label_folders, tmp_path, capsys):
    words = ["evaluate", *label_folders, "--report", tmp_path / "report", "--convention", "strict", "transunet"]
    code, output, errors = run_main([*words, "--interval", "80"], capsys)
    assert (code, errors) == (0, "")
    assert output.endswith(f"report: {tmp_path / 'report' / 'report.md'}\n")
    assert "80 % interval" in output
    report = (tmp_path / "report" / "report.md").read_text()
    for said in ("# predictions against labels", "## Agreement of volumes", "#### Two protocols", "80 % interval"):
        assert said in report
    assert "Where both masks are empty, `strict` scores DSC 1, and `transunet` scores DSC 0." in report
    assert str(tmp_path) not in report
    names = {path.name for path in (tmp_path / "report").iterdir()}
    tables = {f"scores{word}.csv" for word in ("_cases", "_transunet_cases", "_summary", "_readouts")}
    drawn = {"volume_agreement.png", "volume_agreement.csv", "volume_agreement_limits.csv"}
    assert names == {"report.md", *tables, *drawn}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for folder, more in (("report", ()), ("mine", ("--overwrite",))):
        code, _, errors = run_main([*words[:3], "--report", tmp_path / folder, *more], capsys)
        assert (code, "expected a new or an empty folder" in errors) == (2, True)
    assert run_main([*words, "--overwrite"], capsys)[0] == 0


def test_an_interval_of_one_patient_is_refused_where_it_is_asked_for(label_folders, tmp_path, capsys):
    words = ["evaluate", *label_folders, "--out", tmp_path / "scores.csv"]
    code, output, errors = run_main([*words, "--cases", "a", "--interval", "95"], capsys)
    assert (code, output, list(tmp_path.glob("*.csv"))) == (3, "", [])
    assert "patients: expected at least 2: an interval of one says nothing about others, got 1" in errors
    assert "leave out --interval" in errors
    code, output, _ = run_main([*words, "--cases", "a"], capsys)
    assert (code, "% interval" in output) == (0, False)
    code, _, errors = run_main([*words, "--interval", "100"], capsys)
    assert (code, "between 0 and 100" in errors) == (2, True)


def test_cases_of_which_nobody_says_whose_they_are_are_not_called_patients(label_folders, tmp_path, capsys):
    for folder in label_folders:
        shutil.copy(folder / "a.nii.gz", folder / "a2.nii.gz")
    words = ["evaluate", *label_folders, "--overwrite", "--report", tmp_path / "report"]
    own = ", each taken as a patient of its own"
    for given, over, scored in (
        ([], f"3 cases{own}; give --patient REGEX if several are of one.", f"3 cases{own}"),
        (["--patient", "^."], "2 patients, each with all its cases.", "3 cases of 2 patients"),
    ):
        code, output, _ = run_main([*words, *given], capsys)
        report = (tmp_path / "report" / "report.md").read_text()
        assert code == 0
        for text in (output, report):
            assert f"percentile bootstrap over {over}\n" in text
        assert f"| Scored | {scored} |" in report


def test_without_a_table_or_a_report_the_summary_is_printed_and_nothing_written(label_folders, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    code, output, errors = run_main(["evaluate", *label_folders], capsys)
    assert (code, errors, "DSC 0.833" in output, sorted(tmp_path.rglob("*"))) == (0, "", True, before)
    assert "cases:" not in output
    code, _, errors = run_main(
        ["evaluate", *label_folders, "--out", tmp_path / "x.csv", "--segments=orientation"], capsys
    )
    assert (code, "--segments is for the read-outs of a report" in errors) == (2, True)


def test_the_scar_of_each_segment_of_a_cohort_and_of_two_folders(plain_run, scar_cohort, tmp_path, capsys):
    predictions = plain_run / "predictions" / "test"
    words = ["evaluate", predictions, scar_cohort, "--cases", "case006", "case007", "--report", tmp_path / "landmarks"]
    assert run_main([*words, "--segments", "landmarks"], capsys)[0] == 0
    (tmp_path / "labels").mkdir()
    for case in ("case006", "case007"):
        shutil.copy(next(scar_cohort.glob(f"seg/{case}*")), tmp_path / "labels" / f"{case}.nii.gz")
    words = ["evaluate", predictions, tmp_path / "labels", "--report", tmp_path / "orientation"]
    words += ["--segments", "orientation"]
    code, _, errors = run_main(words, capsys)
    assert (code, "also blood pool, myocardium, scar" in errors) == (3, True)
    assert "--target" in errors
    named = [word for name in ("blood pool=1", "myocardium=2", "scar=3") for word in ("--target", name)]
    assert run_main([*words, *named], capsys)[0] == 0
    for folder in ("landmarks", "orientation"):
        with (tmp_path / folder / "scores_readouts.csv").open() as stream:
            lines = [line for line in csv.DictReader(stream) if line["segment"]]
        assert [line["segment"] for line in lines] == [str(number) for number in range(1, 18)] * 2
        assert {line["quantity"] for line in lines} == {"burden"}
        assert {line["unit"] for line in lines} == {"%"}
        assert {line["method"] for line in lines} == {f"of the true wall of the segment, angles from {folder}"}
        shares = [float(line["truth"]) for line in lines]
        assert 0 < max(share for share in shares if not math.isnan(share)) <= 100
