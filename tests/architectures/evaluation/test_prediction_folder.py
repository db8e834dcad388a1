"""Folders of label maps: what is kept, made anew or refused, by what the manifest says."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import nibabel as nib
import pytest

from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.evaluation.predict import predict_cases
from trifuse.architectures.evaluation.prediction_folder import MANIFEST, made_of_other_images, made_of_these_images
from trifuse.architectures.storage.atomic_files import sha256_of
from trifuse.architectures.storage.config_json import config_to_json
from trifuse.architectures.storage.record import read_record
from trifuse.architectures.storage.safetensors_file import digest_of_tensors
from trifuse.kernels import DataError

SIZE = 28
PREPROCESSING = Preprocessing(image_size=SIZE)


def ids(cohort):
    return [case.case_id for case in cohort.cases]


def test_l4_predictions_of_another_model_are_not_mixed_in(make_cohort, threshold, tmp_path):
    cohort = make_cohort("a", "b")
    out = tmp_path / "out"
    predict_cases(threshold(at=1.0), cohort, ["a"], out, PREPROCESSING)
    for model, size in [(threshold(at=2.0), SIZE), (threshold(at=1.0), 2 * SIZE)]:
        with pytest.raises(DataError, match="choose another output folder") as caught:
            predict_cases(model, cohort, ids(cohort), out, Preprocessing(image_size=size))
        assert "intensity" not in str(caught.value), "what is equal is not shown"
    written = (out / MANIFEST).read_text()
    for damaged in ("{", "[1]", "3", written.replace('"a": "', '"a": "0')):  # c22: the last with its old digest
        (out / MANIFEST).write_text(damaged)
        with pytest.raises(DataError, match="a damaged file"):
            predict_cases(threshold(at=1.0), cohort, ids(cohort), out, PREPROCESSING)
    with pytest.raises(DataError, match=r"output folder: expected a folder, .* got a file"):
        predict_cases(threshold(at=1.0), cohort, ids(cohort), out / MANIFEST, PREPROCESSING)
    (out / MANIFEST).unlink()
    with pytest.raises(DataError, match="unknown origin"):
        predict_cases(threshold(at=1.0), cohort, ids(cohort), out, PREPROCESSING)


def test_manifest_names_the_weights(make_cohort, threshold, tmp_path):
    cohort = make_cohort("a")
    model = threshold()
    predict_cases(model, cohort, ids(cohort), tmp_path / "out", PREPROCESSING)
    assert read_record(tmp_path / "out" / MANIFEST) == {
        "weights_sha256": digest_of_tensors(model.state_dict()),
        "preprocessing": {name: value for name, value in config_to_json(PREPROCESSING).items() if name != "nonfinite"},
        "images_sha256": {"a": sha256_of(cohort.cases[0].image)},
        "labels_sha256": {"a": sha256_of(tmp_path / "out" / "a.nii.gz")},
    }


def test_l16_predictions_of_an_older_version_are_continued(make_cohort, threshold, tmp_path, capsys):
    cohort = make_cohort("a", "b")
    out = tmp_path / "out"
    predict_cases(threshold(), cohort, ["a"], out, PREPROCESSING)
    written = read_record(out / MANIFEST)
    scaling = {
        name: written["preprocessing"][name] for name in ("intensity", "window", "resize", "channels", "restore")
    }
    old = {"weights_sha256": written["weights_sha256"], "image_size": SIZE, "preparation": scaling}
    (out / MANIFEST).write_text(json.dumps(old))
    predict_cases(threshold(), cohort, ["a", "b"], out, PREPROCESSING)
    assert "1 label map made anew, because" in capsys.readouterr().err
    images = {case.case_id: sha256_of(case.image) for case in cohort.cases}
    labels = {name: sha256_of(out / f"{name}.nii.gz") for name in images}
    assert read_record(out / MANIFEST) == {**written, "images_sha256": images, "labels_sha256": labels}
    (out / MANIFEST).write_text(json.dumps({**old, "patches": {"spacing_mm": [1.0, 2.0]}}))
    spacing = r"\(1\.0, 2\.0\)|\[1\.0, 2\.0\]"
    run = r"\{'preprocessing\.patches': None\}, of the run that is to predict"
    said = rf"expected {run}, got .*({spacing}).*, which made the label maps in this folder"
    with pytest.raises(DataError, match=said):
        predict_cases(threshold(), cohort, ["a", "b"], out, PREPROCESSING)


def test_l16_a_replaced_image_is_predicted_anew_and_the_others_are_kept(make_cohort, threshold, tmp_path, capsys):
    cohort = make_cohort("a", "b")
    out, image = tmp_path / "out", cohort.case("b").image
    predict_cases(threshold(), cohort, ids(cohort), out, PREPROCESSING)
    assert capsys.readouterr().err == ""
    make_cohort("b", depth=6)
    model = threshold()
    predict_cases(model, cohort, ids(cohort), out, PREPROCESSING)
    assert (nib.load(out / "b.nii.gz").shape, [batch[0] for batch in model.seen]) == ((24, 20, 6), [6])
    said = capsys.readouterr().err
    assert said.startswith(f"note: {out}: 1 label map kept, of the same images; 1 label map made anew")
    assert said.endswith(": b\n")
    predict_cases(model, cohort, ids(cohort), out, PREPROCESSING)
    assert (len(model.seen), capsys.readouterr().err) == (1, f"note: {out}: 2 label maps kept, of the same images\n")
    sound, kept = image.read_bytes(), (out / "b.nii.gz").read_bytes()
    image.write_bytes(sound[:-20])  # is no reason to lose a label map, nor to believe it
    for _ in range(2):
        with pytest.raises(DataError, match="b: not predicted"):
            predict_cases(model, cohort, ids(cohort), out, PREPROCESSING)
        assert (out / "b.nii.gz").read_bytes() == kept
    image.write_bytes(sound)
    predict_cases(model, cohort, ids(cohort), out, PREPROCESSING)
    assert len(model.seen) == 2


def test_l16_label_maps_of_somebody_else_are_refused_or_made_anew_in_a_runs_own_folder(
    make_cohort, threshold, tmp_path, capsys
):
    cohort = make_cohort("a", "b", "c")
    out, truth = tmp_path / "out", cohort.case("b").label
    predict_cases(threshold(), cohort, ["a"], out, PREPROCESSING)
    made = (out / "a.nii.gz").read_bytes()
    (out / "b.nii.gz").write_bytes(truth.read_bytes())  # drawn by hand, where nothing was predicted
    with pytest.raises(DataError, match=r"label maps: .* got others than were written there, of b;.*hand"):
        predict_cases(threshold(), cohort, ["b", "c"], out, PREPROCESSING)
    (out / "a.nii.gz").write_bytes(truth.read_bytes())  # corrected by hand
    make_cohort("a", depth=6)  # another image is no reason to lose the correction
    with pytest.raises(DataError, match="written there, of a, b;"):
        predict_cases(threshold(), cohort, ids(cohort), out, PREPROCESSING)
    assert (out / "a.nii.gz").read_bytes() == (out / "b.nii.gz").read_bytes() == truth.read_bytes()
    make_cohort("a", "b", "c")
    capsys.readouterr()
    predict_cases(threshold(), cohort, ids(cohort), out, PREPROCESSING, replace=True)
    said = capsys.readouterr().err
    assert (said.count("made anew"), said[said.rindex(": ") :]) == (1, ": a, b\n")
    assert (out / "a.nii.gz").read_bytes() == made
    assert (out / "b.nii.gz").read_bytes() != truth.read_bytes()
    predict_cases(threshold(), cohort, ids(cohort), out, PREPROCESSING)
    assert "3 label maps kept" in capsys.readouterr().err


def test_l10_killed_between_the_record_and_the_label_map(make_cohort, threshold, tmp_path, monkeypatch):
    """A label map that was to be made anew is gone, and made the next time: it is not taken for somebody else's."""
    cohort = make_cohort("a")
    out = tmp_path / "out"
    predict_cases(threshold(), cohort, ["a"], out, PREPROCESSING)
    make_cohort("a", depth=6)
    whole = os.replace

    def stopped(source, target):
        if str(target).endswith("a.nii.gz"):
            raise KeyboardInterrupt
        whole(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            predict_cases(threshold(), cohort, ["a"], out, PREPROCESSING)
    predict_cases(threshold(), cohort, ["a"], out, PREPROCESSING)
    assert nib.load(out / "a.nii.gz").shape == (24, 20, 6)


def test_l16_voxels_without_a_number_are_treated_as_asked_each_time(make_cohort, threshold, tmp_path):
    cohort = make_cohort("a")
    for treatment, predicted in (("zero", 1), ("zero", 0), ("median", 1), ("error", 1), ("zero", 0), ("median", 0)):
        model = threshold()  # the image is all numbers, which none but "error" tells
        predict_cases(model, cohort, ["a"], tmp_path / "out", replace(PREPROCESSING, nonfinite=treatment))
        assert len(model.seen) == predicted, treatment


def test_l16_copies_are_of_these_images_where_voxels_without_a_number_are_treated_alike(
    make_cohort, threshold, tmp_path
):
    cohort, out = make_cohort("a"), tmp_path / "out"
    of = {treatment: replace(PREPROCESSING, nonfinite=treatment) for treatment in ("zero", "median")}
    predict_cases(threshold(), cohort, ["a"], out, of["zero"])
    assert made_of_these_images(out, out, cohort, ["a"], of["zero"])
    assert not made_of_these_images(out, out, cohort, ["a"], of["median"])


def test_l16_the_preparation_is_part_of_the_manifest(make_cohort, threshold, tmp_path):
    cohort = make_cohort("a")
    predict_cases(threshold(), cohort, ["a"], tmp_path / "out", PREPROCESSING)
    with pytest.raises(DataError, match="choose another output folder"):
        predict_cases(threshold(), cohort, ["a"], tmp_path / "out", replace(PREPROCESSING, channels=1))


@pytest.mark.parametrize("nonfinite", ["error", "median"])
def test_l16_what_is_not_known_of_images_is_not_said_of_label_maps(make_cohort, threshold, tmp_path, nonfinite):
    """However voxels without a number were treated: that is no matter of the files."""
    cohort = make_cohort("a", "b")
    out = tmp_path / "out"
    predict_cases(threshold(at=1.0), cohort, ids(cohort), out, replace(PREPROCESSING, nonfinite=nonfinite))
    first, second = cohort.cases
    assert made_of_other_images(out, cohort.cases) == []
    second.image.write_bytes(first.image.read_bytes())
    assert made_of_other_images(out, cohort.cases) == ["b"]
    second.image.unlink()
    assert made_of_other_images(out, cohort.cases) == []
    (out / MANIFEST).write_text("[]")  # of another program
    assert made_of_other_images(out, [first]) == []
