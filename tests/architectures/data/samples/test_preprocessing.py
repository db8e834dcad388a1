"""Preprocessing: the transforms of the papers, the same in training and use, and labels that come back unmixed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ready_python import run_python
from scipy import ndimage

from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.samples.volume_to_slices import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    network_input,
    preprocess_volume,
    resized_labels,
    scaled_slices,
)
from trifuse.architectures.data.volumes.nifti import new_volume, write_image
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.architectures.storage.config_json import config_from_json, config_to_json
from trifuse.kernels import MissingExtra

S = 14
OF_S = Preprocessing(image_size=S)
SIZES = st.integers(1, 40)


def volume_of(shown):
    """A volume whose voxels (D, H, W) are the given ones."""
    grid = new_volume(np.zeros(shown.shape[::-1], np.float32), np.diag([-1.0, -1.0, 3.0, 1.0]))
    return Volume(np.asarray(shown, np.float32), grid.spacing_mm, grid.geometry)


# -------------------------------------------------------------------------------------------- transform


def test_transform_matches_its_definition():
    """Percentiles by sorting, resizing by the weights of a triangle filter, written out."""
    voxels = np.random.default_rng(0).gamma(2.0, 100.0, (3, 20, 12))
    got = preprocess_volume(volume_of(voxels), Preprocessing(image_size=8))
    assert got.shape == (3, 3, 8, 8)
    assert got.dtype == torch.float32

    ordered = np.sort(voxels.astype(np.float32).ravel()).astype(np.float64)

    def percentile(share):
        place = share * (ordered.size - 1)
        below = int(place)
        return ordered[below] + (ordered[below + 1] - ordered[below]) * (place - below)

    low, high = percentile(0.01), percentile(0.99)
    unit = (np.clip(voxels, low, high) - low) / (high - low)

    def weights(old, new):
        scale, support = old / new, max(old / new, 1.0)
        distance = np.abs((np.arange(new)[:, None] + 0.5) * scale - np.arange(old) - 0.5)
        triangle = np.maximum(0, 1 - distance / support)
        return triangle / triangle.sum(axis=1, keepdims=True)

    resized = np.einsum("ah,dhw,bw->dab", weights(20, 8), unit, weights(12, 8))
    for channel in range(3):
        expected = (resized - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        np.testing.assert_allclose(got[:, channel].numpy(), expected, atol=2e-5)


def test_brightness_and_contrast_of_the_scanner_do_not_matter():
    voxels = np.random.default_rng(0).gamma(2.0, 100.0, (3, 20, 12))
    torch.testing.assert_close(
        scaled_slices(volume_of(voxels), OF_S), scaled_slices(volume_of(voxels * 7 + 300), OF_S), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("value", [0.0, 5.0, -3e4])
def test_d23_constant_volume_gives_zeros(value):
    with np.errstate(all="raise"):
        assert scaled_slices(volume_of(np.full((2, 5, 5), value)), OF_S).eq(0).all()


def test_d23_constant_but_for_a_few_voxels():
    """What lies above the 99th percentile is clipped away, and nothing is left to divide by."""
    voxels = np.zeros((2, 20, 20))
    voxels[0, 0, 0] = 1000
    assert scaled_slices(volume_of(voxels), OF_S).eq(0).all()


def test_d24_one_slice():
    assert preprocess_volume(volume_of(np.random.default_rng(0).random((1, 9, 7))), OF_S).shape == (1, 3, S, S)


def test_d24_a_thousand_slices_in_bounded_memory(tmp_path):
    """Reading and scaling 1000 slices takes a few times the size of the volume, not of its network input (2.4 GB)."""
    path = tmp_path / "long.nii"
    voxels = np.random.default_rng(0).integers(0, 1000, (96, 96, 1000), dtype=np.int16)
    grid = new_volume(voxels, np.diag([-1.0, -1.0, 3.0, 1.0]))
    write_image(path, grid.voxels, like=grid)
    code = f"""
import resource
import torch
from trifuse.architectures.data.volumes.nifti import read_image
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.samples.volume_to_slices import scaled_slices
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
slices = scaled_slices(read_image({str(path)!r}), Preprocessing(image_size=96))
assert slices.shape == (1000, 96, 96)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    child = run_python("-c", code)
    assert child.returncode == 0, child.stderr
    float32_kib = 96 * 96 * 1000 * 4 / 1024
    assert int(child.stdout) < 5 * float32_kib


def test_masks_are_resized_by_the_nearest_neighbour():
    rng = np.random.default_rng(0)
    labels = volume_of(rng.integers(0, 4, (2, 9, 5)))
    labels = Volume(labels.voxels.astype(np.uint8), labels.spacing_mm, labels.geometry)
    got = resized_labels(labels.voxels, (S, S))
    rows, columns = (np.floor((np.arange(S) + 0.5) * length / S).astype(int) for length in (9, 5))
    np.testing.assert_array_equal(got, labels.voxels[:, rows][:, :, columns])


# ------------------------------------------------------------------------------------------- intensities


@pytest.fixture
def volume():
    return volume_of(np.random.default_rng(0).normal(40, 200, (3, S, S)))


def scaled(volume, *arguments):
    """The slices of a volume that has the right size already, so that only its values change."""
    return scaled_slices(volume, Preprocessing(*arguments, resize="cubic", image_size=S)).numpy()


def test_window(volume):
    expected = (np.clip(volume.voxels, -125, 275) + 125) / 400
    np.testing.assert_allclose(scaled(volume, "window", (-125, 275)), expected, atol=1e-6)


def test_minmax(volume):
    low, high = volume.voxels.min(), volume.voxels.max()
    np.testing.assert_allclose(scaled(volume, "minmax"), (volume.voxels - low) / (high - low), atol=1e-6)


def test_zscore_of_the_whole_volume(volume):
    got = scaled(volume, "zscore")
    np.testing.assert_allclose(got, (volume.voxels - volume.voxels.mean()) / volume.voxels.std(), atol=1e-5)
    assert abs(got.mean()) < 1e-6 < abs(got[0].mean())


def test_as_is_changes_nothing(volume):
    np.testing.assert_array_equal(scaled(volume, "as_is"), volume.voxels)


def test_values_are_clipped_to_the_percentiles_that_are_given(volume):
    low, high = np.percentile(volume.voxels, (10, 80))
    clipped = volume.voxels.clip(low, high)
    got = scaled_slices(volume, Preprocessing(percentiles=(10.0, 80.0), resize="cubic", image_size=S)).numpy()
    np.testing.assert_allclose(got, (clipped - low) / (high - low), atol=1e-6)
    preprocessing = Preprocessing("zscore", percentiles=(10.0, 80.0), resize="cubic", image_size=S)
    got = scaled_slices(volume, preprocessing).numpy()
    np.testing.assert_allclose(got, (clipped - clipped.mean()) / clipped.std(), atol=1e-5)
    assert (abs(got.mean()), got.std()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))


@pytest.mark.parametrize("intensity", ["percentiles", "zscore"])
def test_percentiles_of_older_versions_are_their_defaults(volume, intensity):
    values = config_to_json(Preprocessing(intensity, image_size=S))
    del values["percentiles"]
    old = config_from_json(Preprocessing, values, "run.json")
    assert old.clip_percentiles == {"percentiles": (1.0, 99.0), "zscore": None}[intensity]


@pytest.mark.parametrize(
    ("intensity", "percentiles", "message"),
    [
        (
            "zscore",
            (50.0, 50.0),
            r"percentiles: expected the lowest and the highest, from 0 to 100, such as .*got \(50",
        ),
        ("percentiles", (-1.0, 99.0), "percentiles: expected the lowest"),
        ("percentiles", (1.0, 100.5), "percentiles: expected the lowest"),
        ("percentiles", (float("nan"), 99.0), "percentiles: expected the lowest"),
        ("minmax", (1.0, 99.0), "percentiles: expected none with intensity = 'minmax'"),
        ("as_is", (1.0, 99.0), "percentiles: expected none with intensity = 'as_is'"),
    ],
)
def test_percentiles_that_make_no_sense(intensity, percentiles, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(intensity, percentiles=percentiles)


@pytest.mark.parametrize("intensity", ["percentiles", "minmax", "zscore"])
def test_d23_no_contrast_gives_zeros_whatever_the_scale(intensity):
    with np.errstate(all="raise"):
        assert not scaled(volume_of(np.full((2, S, S), 7.0)), intensity).any()


@pytest.mark.parametrize(
    ("intensity", "window"),
    [("window", None), ("window", (3, 3)), ("window", (0, np.inf)), ("window", (np.nan, 1)), ("minmax", (0, 1))],
)
def test_windows_that_make_no_sense(intensity, window):
    with pytest.raises(ValueError, match="window: expected"):
        Preprocessing(intensity, window)


def test_preparations_survive_json():
    for preprocessing in (
        Preprocessing(percentiles=(0.5, 99.5)),
        Preprocessing("window", (-125.0, 275.0), "cubic", 1, "labels"),
    ):
        assert config_from_json(Preprocessing, config_to_json(preprocessing), "run.json") == preprocessing


def test_one_channel_is_the_image_alone():
    slices = torch.rand(2, S, S)
    assert torch.equal(network_input(slices, Preprocessing(channels=1)), slices[:, None])
    assert network_input(slices, Preprocessing()).shape == (2, 3, S, S)


# ------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("shape", [(9, 23), (32, 31), (S, S), (S, 20)])
def test_cubic_slices_are_scipys(shape):
    """TransUNet zooms each slice by S / H and S / W with cubic splines; overshoot is kept."""
    voxels = np.random.default_rng(0).integers(0, 2, (2, *shape)).astype(np.float32)
    got = scaled_slices(volume_of(voxels), Preprocessing("as_is", resize="cubic", image_size=S)).numpy()
    zoom = [S / shape[0], S / shape[1]]
    expected = [ndimage.zoom(plane, zoom, order=3) if shape != (S, S) else plane for plane in voxels]
    np.testing.assert_array_equal(got, expected)
    assert shape == (S, S) or got.max() > 1


def test_cubic_slices_keep_their_last_row():
    """With scipy's default border the last row and column of these sizes fall out, by rounding, and are zero."""
    ones = volume_of(np.ones((1, 32, 32)))
    assert not ndimage.zoom(ones.voxels[0], 0.5, order=3)[-1].any()
    np.testing.assert_allclose(scaled_slices(ones, Preprocessing("as_is", resize="cubic", image_size=16)), 1, atol=1e-5)


@settings(max_examples=150)
@given(before=st.tuples(SIZES, SIZES), after=st.tuples(SIZES, SIZES))
def test_labels_of_cubic_slices_are_scipys_of_order_0(before, after):
    labels = np.random.default_rng(before).integers(0, 9, (2, *before)).astype(np.uint8)
    got = resized_labels(labels, after, Preprocessing(resize="cubic"))
    zoom = [new / old for old, new in zip(before, after, strict=True)]
    expected = [ndimage.zoom(plane, zoom, order=0, mode="mirror") for plane in labels]
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=150)
@given(before=st.tuples(SIZES, SIZES), after=st.tuples(SIZES, SIZES))
@example(before=(6, 12), after=(37, 37))  # where float64 rounds to another pixel than torch's float32
def test_labels_of_linear_slices_are_torchs_nearest(before, after):
    labels = np.random.default_rng(before).integers(0, 9, (2, *before)).astype(np.uint8)
    planes = torch.from_numpy(labels)[:, None]
    expected = torch.nn.functional.interpolate(planes, size=after, mode="nearest-exact")[:, 0]
    np.testing.assert_array_equal(resized_labels(labels, after), expected)


@pytest.mark.parametrize("resize", ["linear", "cubic"])
def test_labels_are_never_mixed_and_come_back(resize):
    """No value appears that was not there, and enlarging loses nothing."""
    labels = np.random.default_rng(0).choice(np.array([0, 3, 8], np.uint8), (2, 9, 7))
    preprocessing = Preprocessing(resize=resize)
    large = resized_labels(labels, (40, 40), preprocessing)
    assert set(np.unique(large)) == {0, 3, 8}
    np.testing.assert_array_equal(resized_labels(large, (9, 7), preprocessing), labels)


@pytest.mark.parametrize("resize", ["linear", "cubic"])
def test_labels_stay_on_the_image(resize):
    """The corner of a bright square is where the corner of its label is, at every size."""
    labels = np.zeros((1, 31, 31), np.uint8)
    labels[0, 10:21, 4:27] = 1
    for size in (15, 31, 62, 100):
        preprocessing = Preprocessing("as_is", resize=resize, image_size=size)
        image = scaled_slices(volume_of(labels.astype(np.float32)), preprocessing)[0].numpy()
        assert ((image > 0.5) != resized_labels(labels, (size, size), preprocessing)[0]).mean() < 0.06 * 31 / size


def test_l6_cubic_without_scipy(volume, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(MissingExtra, match=r"cubic resizing needs scipy.*trifuse\[med\]"):
        scaled_slices(volume, Preprocessing(resize="cubic", image_size=2 * S))
