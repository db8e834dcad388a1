"""From volumes to label maps on the native grid: right, whole files, and going on after a fault."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from children import Child
from leftovers import leave_half
from torch import nn

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.samples.volume_to_slices import preprocess_volume, resized_labels
from trifuse.architectures.data.volumes.nifti import read_image
from trifuse.architectures.evaluation.predict import predict_cases, predict_volume
from trifuse.architectures.evaluation.prediction_folder import MANIFEST
from trifuse.kernels import DataError, NumericError

SIZE = 28
PREPROCESSING = Preprocessing(image_size=SIZE)


def ids(cohort):
    return [case.case_id for case in cohort.cases]


def test_prediction_lands_on_the_native_grid(make_cohort, threshold, tmp_path):
    cohort = make_cohort("a", "b")
    paths = predict_cases(threshold(), cohort, ids(cohort), tmp_path / "out", PREPROCESSING, batch_size=3)
    assert [path.name for path in paths] == ["a.nii.gz", "b.nii.gz"]
    for case, path in zip(cohort.cases, paths, strict=True):
        written, image, label = nib.load(path), nib.load(case.image), nib.load(case.label)
        assert written.shape == image.shape
        np.testing.assert_array_equal(written.affine, image.affine)
        assert written.get_data_dtype() == np.uint8
        got, want = np.asarray(written.dataobj), np.asarray(label.dataobj)
        assert 2 * (got & want).sum() / (got.sum() + want.sum()) > 0.9  # resizing there and back costs a rim


def test_logits_are_resized_before_the_argmax(make_cohort):
    """A checkerboard of class 1 and 2 at half size: labels resized after an argmax would keep its hard squares."""

    class Constant(nn.Module):
        def forward(self, image):
            logits = torch.zeros(len(image), 3, 2, 2)
            logits[:, 1, 0, 0] = logits[:, 2, 1, 1] = 1.0
            logits[:, 0] = 0.3
            return logits

    cohort = make_cohort("a", depth=3)
    volume = read_image(cohort.cases[0].image)
    labels = predict_volume(Constant(), volume, PREPROCESSING)
    height, width = volume.voxels.shape[1:]
    small = torch.zeros(1, 3, 2, 2)
    small[0, 1, 0, 0] = small[0, 2, 1, 1] = 1.0
    small[0, 0] = 0.3
    want = nn.functional.interpolate(small, size=(height, width), mode="bilinear", align_corners=False).argmax(1)[0]
    assert labels.dtype == np.uint8
    for one in labels:
        np.testing.assert_array_equal(one, want)
    nearest = nn.functional.interpolate(small.argmax(1)[None].float(), size=(height, width))[0, 0]
    assert (want != nearest).any()


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batches_hold_batch_size_slices_and_change_nothing(make_cohort, threshold, batch_size):
    cohort = make_cohort("a", depth=7)
    volume = read_image(cohort.cases[0].image)
    model = threshold(shrink=2)
    labels = predict_volume(model, volume, PREPROCESSING, batch_size)
    assert max(shape[0] for shape in model.seen) == min(batch_size, 7)
    assert sum(shape[0] for shape in model.seen) == 7
    np.testing.assert_array_equal(labels, predict_volume(threshold(shrink=2), volume, PREPROCESSING, 2))


def test_one_logit_is_a_sigmoid(make_cohort, threshold):
    volume = read_image(make_cohort("a").cases[0].image)

    class One(threshold):
        def forward(self, image):
            return super().forward(image)[:, 1:]

    one, two = (predict_volume(model, volume, PREPROCESSING) for model in (One(), threshold()))
    np.testing.assert_array_equal(one, two)


def test_one_slice_and_training_mode_comes_back(make_cohort, threshold):
    cohort = make_cohort("a", depth=1, empty=True)
    volume = read_image(cohort.cases[0].image)
    model = threshold(at=1e9).train()
    assert predict_volume(model, volume, PREPROCESSING).shape == volume.voxels.shape
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_memory_does_not_grow_with_classes_times_volume(make_cohort):
    """Thirty classes and forty slices: no tensor as large as the whole volume's logits may ever be made."""

    class ManyClasses(nn.Module):
        def forward(self, image):
            return image[:, :1].expand(-1, 30, -1, -1)

    volume = read_image(make_cohort("a", depth=40).cases[0].image)
    sizes = []
    resize = nn.functional.interpolate

    def watch(x, *args, **kwargs):
        y = resize(x, *args, **kwargs)
        sizes.append(y.numel())
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "interpolate", watch)
        predict_volume(ManyClasses(), volume, PREPROCESSING, batch_size=2)
    assert len(sizes) >= 20
    assert max(sizes) <= max(30 * 2 * 24 * 20, 16 * SIZE * SIZE)


def test_nan_logits_name_the_slices(make_cohort):
    class Broken(nn.Module):
        def forward(self, image):
            logits = torch.zeros(len(image), 2, 4, 4)
            logits[1, 0, 0, 0] = float("nan")
            return logits

    volume = read_image(make_cohort("a", depth=4).cases[0].image)
    with pytest.raises(NumericError, match=r"slices \[1\]"):
        predict_volume(Broken(), volume, PREPROCESSING, batch_size=4)


def test_l9_one_broken_case_of_ten(make_cohort, threshold, tmp_path):
    cohort = make_cohort(*(f"case_{i}" for i in range(10)))
    broken = cohort.case("case_4").image
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"(?s)case_4: not predicted.*case_4\.nii\.gz") as caught:
        predict_cases(threshold(), cohort, ids(cohort), out, PREPROCESSING)
    assert "case_3" not in str(caught.value)
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"case_{i}.nii.gz" for i in range(10) if i != 4]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}

    broken.write_bytes(whole)
    again = threshold()
    paths = predict_cases(again, cohort, ids(cohort), out, PREPROCESSING, batch_size=4)
    assert len(paths) == 10
    assert again.seen == [(4, 3, SIZE, SIZE)]  # the four slices of the missing case and nothing else
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_l10_killed_midway_leaves_no_half_file(make_cohort, tmp_path):
    cohort = make_cohort(*(f"case_{i}" for i in range(8)))
    out = tmp_path / "out"

    class Slow(nn.Module):
        pause_s = 0.2

        def forward(self, image):
            time.sleep(self.pause_s)
            return torch.stack([-image[:, 0], image[:, 0]], 1)

    child = Child(lambda: predict_cases(Slow(), cohort, ids(cohort), out, PREPROCESSING))
    deadline = time.monotonic() + 60
    while not list(out.glob("case_*.nii.gz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    whole = list(out.glob("case_*.nii.gz"))
    assert 1 <= len(whole) < 8
    for path in whole:
        assert np.asarray(nib.load(path).dataobj).shape == (24, 20, 4)
    leave_half(out / "case_7.nii.gz")
    Slow.pause_s = 0.0
    predict_cases(Slow(), cohort, ids(cohort), out, PREPROCESSING)
    assert sorted(path.name for path in out.iterdir()) == [*(f"case_{i}.nii.gz" for i in range(8)), MANIFEST]


def test_a_failed_write_leaves_nothing_behind(make_cohort, threshold, tmp_path, monkeypatch):
    cohort = make_cohort("a")
    out = tmp_path / "out"

    replace = os.replace

    def full(source, target):
        if str(target).endswith(".nii.gz"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        predict_cases(threshold(), cohort, ids(cohort), out, PREPROCESSING)
    assert [path.name for path in out.iterdir()] == [MANIFEST]


def test_l5_the_folder_of_the_input_is_refused(make_cohort, threshold):
    cohort = make_cohort("a")
    before = (cohort.root / "images" / "a.nii.gz").read_bytes()
    for folder in (
        cohort.root,
        cohort.root / "images",
        cohort.root / "labels",
        cohort.root / "images" / ".." / "images",
    ):
        with pytest.raises(DataError, match="the folder of the input"):
            predict_cases(threshold(), cohort, ids(cohort), folder, PREPROCESSING)
    assert (cohort.root / "images" / "a.nii.gz").read_bytes() == before


def test_l8_no_case_and_unknown_cases(make_cohort, threshold, tmp_path):
    cohort = make_cohort("a")
    with pytest.raises(DataError, match="0 cases"):
        predict_cases(threshold(), cohort, [], tmp_path / "out", PREPROCESSING)
    with pytest.raises(DataError, match=r"(?s)2 problems.*nobody.*somebody"):
        predict_cases(threshold(), cohort, ["a", "nobody", "somebody"], tmp_path / "out", PREPROCESSING)
    assert not (tmp_path / "out").exists()


def test_d27_l13_names_with_spaces_and_umlauts_and_no_labels_at_all(make_cohort, threshold, tmp_path):
    cohort = make_cohort("Müller 3", "x" * 200)
    shutil.rmtree(cohort.root / "labels")
    cohort = open_cohort(cohort.root, "plain")
    paths = predict_cases(threshold(), cohort, ids(cohort), tmp_path / "out", PREPROCESSING)
    assert sorted(path.name for path in paths) == ["Müller 3.nii.gz", "x" * 200 + ".nii.gz"]
    assert all(path.is_file() for path in paths)


def test_d22_nan_voxels_are_refused_or_replaced_as_asked(make_cohort, threshold, tmp_path):
    cohort = make_cohort("a")
    image = nib.load(cohort.cases[0].image)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine), cohort.cases[0].image)
    with pytest.raises(DataError, match="not predicted"):
        predict_cases(threshold(), cohort, ["a"], tmp_path / "out", PREPROCESSING)
    predict_cases(threshold(), cohort, ["a"], tmp_path / "out", replace(PREPROCESSING, nonfinite="median"))
    assert (tmp_path / "out" / "a.nii.gz").is_file()


def test_native_size_does_not_depend_on_the_networks(make_cohort, threshold):
    cohort = make_cohort("a")
    image, label = load_case(cohort, cohort.cases[0])
    for size in (14, 28, 56):
        labels = predict_volume(threshold(), image, Preprocessing(image_size=size))
        assert labels.shape == label.voxels.shape


class Heads(nn.Module):
    """Two maps of two classes at their own sizes; the finer one is wrong by itself, their sum is right."""

    def __init__(self, poisoned: int | None = None, classes: int = 2) -> None:
        super().__init__()
        self.poisoned, self.classes = poisoned, classes

    def forward(self, image):
        raise AssertionError("a network with head maps is asked for these")

    def head_maps(self, image):
        bright = nn.functional.avg_pool2d(image[:, :1], 2) - 1.0
        maps = [nn.functional.avg_pool2d(2 * bright, 2), -0.5 * bright]
        maps = [torch.cat([-x, x], 1) if self.classes == 2 else x for x in maps]
        if self.poisoned is not None:
            maps[self.poisoned][1] = float("inf")
        return maps


@pytest.mark.parametrize("classes", [1, 2])
def test_head_maps_are_added_up_at_the_size_of_the_image(make_cohort, classes):
    volume = read_image(make_cohort("a").cases[0].image)
    labels = predict_volume(Heads(classes=classes), volume, PREPROCESSING)
    size = volume.voxels.shape[1:]
    maps = Heads(classes=1).head_maps(preprocess_volume(volume, PREPROCESSING))
    native = [nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)[:, 0] for x in maps]
    np.testing.assert_array_equal(labels, (sum(native) > 0).numpy())
    assert (labels != (native[1] > 0).numpy()).any()
    assert labels.any()


@pytest.mark.parametrize("head", [0, 1])
def test_a_head_that_is_not_finite_names_the_slices(make_cohort, head):
    volume = read_image(make_cohort("a", depth=4).cases[0].image)
    with pytest.raises(NumericError, match=r"slices \[1, 3\]|slices \[1\]"):
        predict_volume(Heads(poisoned=head), volume, PREPROCESSING, batch_size=2)


def test_labels_are_chosen_before_they_are_resized_where_training_was_so(make_cohort, threshold):
    """Restored labels are those of S x S, each pixel of the image taking one of theirs."""
    volume = read_image(make_cohort("a").cases[0].image)
    preprocessing = Preprocessing(resize="cubic", channels=1, restore="labels", image_size=SIZE)
    model = threshold(at=0.5, shrink=4)
    labels = predict_volume(model, volume, preprocessing)
    with torch.no_grad():
        logits = model(preprocess_volume(volume, preprocessing))
    small = nn.functional.interpolate(logits, size=(SIZE, SIZE), mode="bilinear", align_corners=False).argmax(1)
    want = resized_labels(small.numpy().astype(np.uint8), volume.voxels.shape[1:], preprocessing)
    np.testing.assert_array_equal(labels, want)
    resized_first = predict_volume(model, volume, replace(preprocessing, restore="logits"))
    assert (labels != resized_first).any()
