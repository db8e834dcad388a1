"""``trifuse evaluate``: scores as a run has them, conventions side by side, and folders that were not meant."""

from __future__ import annotations

import csv
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
from command import ABDOMEN_TRAINING, run_main

from trifuse.architectures.cli.evaluate import CONVENTIONS, _tables
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
