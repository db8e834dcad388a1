"""Prediction window by window: on the native grid, every pixel covered, windows weighted, mirrored, and told all."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trifuse.architectures.data.samples.preprocessing import Patches, Preprocessing
from trifuse.architectures.data.samples.resampling import PlaneGrid
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.data.volumes.nifti import read_image, read_labels
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.architectures.evaluation.predict import predict_cases
from trifuse.architectures.evaluation.prediction_folder import MANIFEST
from trifuse.architectures.evaluation.sliding_window import sliding_window_inference, window_weights
from trifuse.kernels import DataError, NumericError

P = 8
AS_IS = Preprocessing("as_is", channels=1)


class Levels(nn.Module):
    """Logits whose largest is that of the class that the image's values name; it notes what it is shown."""

    def __init__(self, classes=4):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.classes = classes
        self.seen = []

    def forward(self, image, **inputs):
        self.seen.append({"image": image.clone(), **inputs})
        return -self.scale * (image[:, :1] - torch.arange(self.classes)[:, None, None]) ** 2


class Prior(nn.Module):
    """Answer with the prior: class 1 where the image's window has a segment at all."""

    def forward(self, image, prior):
        shown = prior.sum(1, keepdim=True)
        return 10 * torch.cat([0.5 - shown, shown - 0.5], dim=1)


def volume(shown, spacing_mm=(20.0, 1.0, 1.0)):
    return Volume(np.ascontiguousarray(shown, np.float32), spacing_mm, geometry=None)  # prediction needs no more


def predicted(model, shown, native_mm=(20.0, 1.0, 1.0), patch_size=P, side_inputs=None, batch_size=3, **options):
    patches = Patches(**{"spacing_mm": (1.0, 1.0), **options})
    preprocessing = replace(AS_IS, image_size=patch_size, patches=patches)
    image = volume(shown, native_mm)
    return sliding_window_inference(model, image, preprocessing, side_inputs, batch_size)


def random_levels(shape, seed=0):
    return np.random.default_rng(seed).integers(1, 4, shape)


# ------------------------------------------------------------------------------------------- on the native grid


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 25), st.integers(1, 25)),
    st.integers(2, 11),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.booleans(),
    st.integers(1, 40),
)
def test_what_the_network_knows_comes_back_pixel_by_pixel(shape, patch_size, step, mirror, batch_size):
    """At the spacing of the volume, whatever sizes; zeros around what is shown belong to the crop."""
    shown = random_levels(shape)
    shown[:, -1] = 0
    labels = predicted(Levels(), shown, patch_size=patch_size, step=step, mirror=mirror, batch_size=batch_size)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, shown)


@pytest.mark.parametrize("spacing_mm", [(20.0, 0.7, 1.3), (20.0, 1.9, 0.45)])
@pytest.mark.parametrize("shape", [(2, 31, 23), (1, 17, 40)])
def test_other_spacings_come_back_in_place(shape, spacing_mm):
    """Blobs of two pixels and more survive the way to 1 mm and back but for a rim; a shift of a pixel would not."""
    _, rows, columns = shape
    shown = np.ones(shape, int)
    shown[:, rows // 4 : rows // 2, columns // 3 : -columns // 4] = 3
    labels = predicted(Levels(), shown, spacing_mm)
    assert labels.shape == shape
    both = ((labels == 3) & (shown == 3)).sum()
    assert 2 * both / ((labels == 3).sum() + (shown == 3).sum()) > 0.9
    centres = [np.argwhere(one == 3)[:, 1:].mean(0) for one in (labels, shown)]
    np.testing.assert_allclose(*centres, atol=0.6)


def test_probabilities_are_resampled_and_not_labels():
    """Half a pixel of a class that wins by little moves the border less than a whole one would."""

    class Slope(nn.Module):
        def forward(self, image):
            return torch.cat([torch.zeros_like(image), image], dim=1)

    shown = np.tile(np.linspace(-2, 2.6, 16), (1, 12, 1))
    shown[shown == 0] = 0.01
    labels = predicted(Slope(), shown, spacing_mm=(1.0, 4.0), mirror=False)
    np.testing.assert_array_equal(labels[0, 6, 2:-2], shown[0, 6, 2:-2] > 0)


def test_outside_of_the_non_zero_box_is_background():
    class One(nn.Module):
        def forward(self, image):
            return torch.stack([torch.zeros(len(image), P, P), torch.ones(len(image), P, P)], dim=1)

    shown = np.zeros((4, 20, 20))
    shown[1:3, 4:15, 2:9] = 5
    labels = predicted(One(), shown)
    np.testing.assert_array_equal(labels, shown > 0)


def test_values_are_scaled_as_in_training():
    shown = np.random.default_rng(0).normal(50, 9, (2, 11, 14))
    model = Levels()
    image = volume(shown)
    zscore = Preprocessing("zscore", channels=1, image_size=32, patches=Patches((1.3, 1.3), mirror=False))
    sliding_window_inference(model, image, zscore)
    grid = PlaneGrid.of(image, (1.3, 1.3))
    np.testing.assert_array_equal(model.seen[0]["image"][:, 0, 12:20, 11:22], grid.image(image.voxels, zscore))
    sliding_window_inference(model, image, replace(zscore, channels=3))
    assert model.seen[1]["image"].shape == (2, 3, 32, 32)


def test_one_logit_is_a_sigmoid():
    shown = random_levels((2, 13, 9)) - 2.0

    class Sigmoid(nn.Module):
        def forward(self, image):
            return 9 * image

    np.testing.assert_array_equal(predicted(Sigmoid(), shown), shown > 0)


# ---------------------------------------------------------------------------------------------- windows, mirrors


def test_weights_are_gaussian_about_the_middle():
    weights = window_weights(16)
    along = np.exp(-0.5 * ((np.arange(16) - 7.5) / 2) ** 2)
    np.testing.assert_allclose(weights, along[:, None] * along, rtol=1e-5)
    assert (weights > 0).all()
    assert window_weights(512).min() > 0


def test_the_middle_of_a_window_counts_most():
    """Windows answer by where a pixel lies in them: each overlap is decided by the window whose middle is nearer."""

    class Half(nn.Module):
        """Class 1 with 0.7 in the first window of a row, class 0 with 0.7 in the others."""

        def forward(self, image):
            first = (image == 1).any(dim=-1).any(dim=-1).float()[..., None, None]  # the value 1 is in column 0 alone
            odds = np.log(7 / 3) * (2 * first - 1)
            return torch.cat([-odds, odds], dim=1).expand(-1, -1, P, P) / 2

    shown = np.full((1, P, P + P // 2), 2)
    shown[:, :, 0] = 1
    labels = predicted(Half(), shown, mirror=False)
    np.testing.assert_array_equal(labels[0], np.tile(np.arange(P + P // 2) < 6, (P, 1)))


def test_windows_are_half_a_patch_apart_at_most():
    model = Levels()
    predicted(model, random_levels((1, P, 2 * P + 1)), mirror=False, batch_size=99)
    assert model.seen[0]["image"].shape == (4, 1, P, P)  # 0, 3, 6, 9
    model = Levels()
    predicted(model, random_levels((1, P, 2 * P + 1)), mirror=False, step=1.0, batch_size=99)
    assert model.seen[0]["image"].shape == (3, 1, P, P)


def test_batches_hold_so_many_windows_at_most():
    model = Levels()
    shown = random_levels((5, P, 2 * P))
    labels = predicted(model, shown, mirror=False, batch_size=4)  # three windows a slice
    assert [len(seen["image"]) for seen in model.seen] == [3] * 5
    model = Levels()
    np.testing.assert_array_equal(predicted(model, shown, mirror=False, batch_size=7), labels)
    assert [len(seen["image"]) for seen in model.seen] == [6, 6, 3]
    model = Levels()
    np.testing.assert_array_equal(predicted(model, shown, mirror=False, batch_size=2), labels)
    assert [len(seen["image"]) for seen in model.seen] == [2, 1] * 5


def test_the_mean_over_mirrorings_is_equivariant():
    """A network that prefers its left sees all four sides: a mirrored volume gives mirrored labels."""

    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, image):
            return self.conv(image) + torch.linspace(0, 1, P)

    shown = np.random.default_rng(0).normal(0, 2, (2, 14, 19))
    for axes in ((1,), (2,), (1, 2)):
        mirrored = np.flip(predicted(Left(), np.flip(shown, axes)), axes)
        np.testing.assert_array_equal(mirrored, predicted(Left(), shown))
    assert (
        np.flip(predicted(Left(), shown[:, :, ::-1], mirror=False), 2) != predicted(Left(), shown, mirror=False)
    ).any()


def test_each_mirroring_is_shown_once_and_turned_back():
    model = Levels()
    shown = random_levels((1, P, P))
    np.testing.assert_array_equal(predicted(model, shown), shown)
    images = [seen["image"][0, 0].numpy() for seen in model.seen]
    wanted = [shown[0], shown[0][:, ::-1], shown[0][::-1], shown[0][::-1, ::-1]]
    for image, want in zip(images, wanted, strict=True):
        np.testing.assert_array_equal(image, want)


# ------------------------------------------------------------------------------------------------------- side_inputs


@pytest.mark.parametrize("mirror", [False, True])
def test_the_prior_moves_with_the_windows_and_the_mirrorings(mirror):
    rng = np.random.default_rng(0)
    segments = (rng.integers(1, 18, (3, 15, 21)) * (rng.random((3, 15, 21)) < 0.5)).astype(np.uint8)
    shown = np.ones(segments.shape)
    shown[:, 0] = 0  # cropped off, so that the prior must be, too
    labels = predicted(Prior(), shown, side_inputs=SideInputs(segments), mirror=mirror)
    np.testing.assert_array_equal(labels, (segments > 0) & (shown > 0))


def test_channels_of_the_prior_and_constants_reach_the_network():
    model = Levels()
    segments = np.arange(P * P).reshape(1, P, P).astype(np.uint8) % 18
    constants = {"ecg": torch.randn(12, 5), "interval": torch.tensor(7.0), "has_ecg": torch.tensor(True)}
    predicted(
        model, np.repeat(random_levels((1, P, P)), 3, 0), side_inputs=SideInputs(np.repeat(segments, 3, 0), constants)
    )
    assert len(model.seen) == 4
    for seen, axes in zip(model.seen, ((), (-1,), (-2,), (-2, -1)), strict=True):
        numbers = torch.from_numpy(segments).flip(axes)
        one_hot = nn.functional.one_hot(numbers.long(), 18).movedim(-1, 1)[:, 1:].float()
        assert torch.equal(seen["prior"], one_hot.expand(3, -1, -1, -1))
        assert torch.equal(seen["ecg"], constants["ecg"].expand(3, 12, 5))
        assert torch.equal(seen["interval"], torch.full((3,), 7.0))
        assert seen["has_ecg"].tolist() == [True] * 3


class Grid(nn.Module):
    """Answer with a map of its own that knows no image, and follows every mirroring that it is told of."""

    def __init__(self, levels):
        super().__init__()
        self.logits = nn.Parameter(nn.functional.one_hot(levels, 4).movedim(-1, 0).float())

    def forward(self, image, transform):
        places = nn.functional.affine_grid(transform, [len(image), 4, P, P], align_corners=False)
        return nn.functional.grid_sample(self.logits.expand(len(image), -1, -1, -1), places, align_corners=False)


def test_a_network_is_told_how_its_windows_are_mirrored():
    levels = random_levels((1, P, P))
    model, side_inputs = Grid(torch.from_numpy(levels[0])), SideInputs(transform=True)
    for mirror in (False, True):
        found = predicted(model, np.ones((1, P, P)), side_inputs=side_inputs, mirror=mirror)
        np.testing.assert_array_equal(found, levels)


def test_nan_logits_name_the_slices_of_the_volume():
    class Broken(nn.Module):
        def forward(self, image):
            return torch.where(image == 3, torch.nan, torch.cat([image, -image], dim=1))

    shown = np.ones((6, 12, 9))
    shown[:2] = 0
    shown[3, 11, 8] = shown[5, 0, 0] = 3
    with pytest.raises(NumericError, match=r"slices \[3\] "):
        predicted(Broken(), shown, batch_size=6)


def test_training_mode_comes_back_and_no_gradient_is_kept():
    model = Levels().train()
    predicted(model, random_levels((1, 9, 9)))
    assert model.training
    assert model.scale.grad is None


def test_a_spacing_is_needed():
    with pytest.raises(ValueError, match=r"patches\.spacing_mm"):
        predicted(Levels(), random_levels((1, 9, 9)), spacing_mm=None)


# ------------------------------------------------------------------------------------------------ whole cohorts


def ids(cohort):
    return [case.case_id for case in cohort.cases]


PATCHES = Preprocessing("zscore", channels=1, image_size=P, patches=Patches(spacing_mm=(1.5, 1.25)))


def test_cases_are_predicted_by_windows(make_cohort, threshold, tmp_path):
    cohort = make_cohort("a", "b")
    paths = predict_cases(threshold(at=0.5), cohort, ids(cohort), tmp_path / "out", PATCHES)
    for case, path in zip(cohort.cases, paths, strict=True):
        got, want = read_image(path), read_image(case.label)
        np.testing.assert_array_equal(got.voxels, want.voxels)
        np.testing.assert_array_equal(got.geometry.affine, want.geometry.affine)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["preprocessing"]["patches"]["spacing_mm"] == [1.5, 1.25]
    assert "extras_sha256" not in manifest
    for other in (None, Patches(spacing_mm=(1.5, 1.5)), Patches(spacing_mm=(1.5, 1.25), mirror=False)):
        with pytest.raises(DataError, match=r"made by.*patches"):
            predict_cases(threshold(at=0.5), cohort, ids(cohort), tmp_path / "out", replace(PATCHES, patches=other))


class ImageAndPrior(nn.Module):
    """See the bright part of an image where the prior says so."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(0.5))

    def forward(self, image, prior=None):
        shown = 1 if prior is None else prior.sum(1, keepdim=True)
        bright = (image - self.at) * shown
        return torch.cat([-bright, bright], dim=1)


def test_predictions_with_another_prior_are_not_taken_for_the_same_ones(make_cohort, tmp_path):
    cohort = make_cohort("a", "b", "c")
    shape = read_image(cohort.cases[0].image).voxels.shape
    side_inputs = {name: SideInputs(np.ones(shape, np.uint8)) for name in "abc"}
    out = tmp_path / "out"

    def predict(names, side_inputs):
        return predict_cases(ImageAndPrior(), cohort, names, out, PATCHES, side_inputs=side_inputs)

    predict(["a", "b"], side_inputs)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    predict(["a", "b", "c"], side_inputs)  # a new case needs no new folder
    predict(["c"], {"c": side_inputs["c"]})
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(json.loads((out / MANIFEST).read_text())["extras_sha256"]) == ["a", "b", "c"]
    other = {**side_inputs, "b": SideInputs(np.zeros(shape, np.uint8))}
    with pytest.raises(DataError, match="another prior or ECG of b"):
        predict(["a", "b"], other)
    with pytest.raises(DataError, match="another prior or ECG of a, b, c"):
        predict(["a", "b", "c"], None)
    predict(["a"], other)
    (out / "b.nii.gz").unlink()
    predict(["b"], other)
    assert not read_image(out / "b.nii.gz").voxels.any()
    make_cohort("a", depth=5)  # another image, and the prior that is predicted from it
    predict(["a"], {"a": SideInputs(np.zeros(read_image(cohort.cases[0].image).voxels.shape, np.uint8))})
    assert not read_image(out / "a.nii.gz").voxels.any()


def test_a_digest_sees_prior_and_constants():
    digests = {
        SideInputs(prior, constants).digest()
        for prior in (None, np.zeros((1, 2, 2), np.uint8), np.ones((1, 2, 2), np.uint8))
        for constants in ({}, {"interval": torch.tensor(1.0)}, {"interval": torch.tensor(2.0)})
    }
    assert len(digests) == 9
    assert SideInputs(notes=("odd",)).digest() == SideInputs().digest()


def test_extras_of_a_case_that_are_missing_or_not_wanted(make_cohort, threshold, tmp_path):
    cohort = make_cohort("a")
    with pytest.raises(DataError, match="a: side_inputs"):
        predict_cases(threshold(), cohort, ["a"], tmp_path / "out", PATCHES, side_inputs={})
    with pytest.raises(ValueError, match="side_inputs: expected none for whole slices"):
        predict_cases(threshold(), cohort, ["a"], tmp_path / "out", replace(PATCHES, patches=None), side_inputs={})
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- real data


def test_a_real_heart_comes_back_in_place(trifuse_data):
    """A network that knows the truth, through another spacing and back, for a real image of its own grid."""
    truth = sorted(trifuse_data.glob("sunnybrook_cine_sax/*/*_gt.nii.gz"))[0]
    image = read_image(truth.with_name(truth.name.replace("_gt", "")))
    labels = (read_labels(truth, like=image).voxels == 3).astype(np.uint8)
    patches = Patches(tuple(1.2 * step for step in image.spacing_mm[1:]), mirror=False)
    preprocessing = replace(PATCHES, image_size=96, patches=patches)
    got = sliding_window_inference(Prior(), image, preprocessing, SideInputs(labels), batch_size=4)
    assert got.shape == labels.shape
    assert 2 * (got & labels).sum() / (got.sum() + labels.sum()) > 0.93
