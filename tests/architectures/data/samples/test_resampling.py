"""Volumes at another spacing in plane: where pixels lie, what each kind of value becomes, and the crop."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.samples.resampling import PlaneGrid, nonzero_box
from trifuse.architectures.data.samples.volume_to_slices import scaled_voxels
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.kernels import DataError, MissingExtra

AS_IS = Preprocessing("as_is", channels=1)
ZSCORE = Preprocessing("zscore", channels=1)


def volume(shown, spacing_mm=(8.0, 2.0, 1.0)):
    return Volume(np.asarray(shown, np.float32), spacing_mm, geometry=None)  # a plane's grid needs no more


def whole(shape, size):
    return PlaneGrid(tuple(slice(0, length) for length in shape), size)


@given(arrays.arrays(np.int16, st.tuples(*[st.integers(1, 6)] * 3), elements=st.sampled_from([0, 0, 0, 5])))
def test_the_box_holds_all_non_zero_voxels_and_no_more(voxels):
    box = nonzero_box(voxels)
    inside = voxels[box]
    assert np.count_nonzero(inside) == np.count_nonzero(voxels)
    if voxels.any():
        for axis in range(3):
            assert inside.take(0, axis).any()
            assert inside.take(-1, axis).any()
    else:
        assert inside.shape == voxels.shape


def test_a_grid_divides_the_box_into_pixels_of_the_spacing():
    shown = np.zeros((5, 12, 20))
    shown[1:4, 2:9, 3:18] = 7
    image = volume(shown)
    grid = PlaneGrid.of(image, (1.5, 1.5))
    assert grid.box == (slice(1, 4), slice(2, 9), slice(3, 18))
    assert grid.size == (round(7 * 2 / 1.5), round(15 * 1 / 1.5))
    assert PlaneGrid.of(image, (1000.0, 1000.0)).size == (1, 1)


def test_d14_an_image_that_would_become_many_times_larger_is_refused_beforehand():
    assert PlaneGrid.of(volume(np.ones((1, 4, 4)), (8.0, 16.0, 16.0)), (1.0, 1.0)).size == (64, 64)
    with pytest.raises(
        DataError, match=r"spacing: .* got pixels of 90 x 1 mm, which would be resampled to 1\.5 x 1\.5 mm"
    ):
        PlaneGrid.of(volume(np.ones((1, 256, 256)), (8.0, 90.0, 1.0)), (1.5, 1.5))


def test_at_its_own_spacing_all_is_cropped_and_nothing_resampled():
    rng = np.random.default_rng(0)
    shown = rng.integers(1, 99, (3, 6, 5)).astype(np.float32)
    shown[0], shown[:, :, -1] = 0, 0
    box = slice(1, 3), slice(0, 6), slice(0, 4)
    labels = rng.integers(0, 4, shown.shape).astype(np.uint8)
    grid = PlaneGrid.of(volume(shown), (2.0, 1.0))
    np.testing.assert_array_equal(grid.image(shown, ZSCORE), scaled_voxels(shown[box], ZSCORE))
    np.testing.assert_array_equal(grid.labels(labels), labels[box])
    np.testing.assert_array_equal(grid.nearest(labels), labels[box])


def test_values_are_scaled_within_the_box():
    shown = np.zeros((4, 9, 9), np.float32)
    shown[1:3, 2:8, 1:6] = np.random.default_rng(0).normal(500, 30, (2, 6, 5))
    scaled = PlaneGrid.of(volume(shown), (2.0, 1.0)).image(shown, ZSCORE)
    assert scaled.shape == (2, 6, 5)
    assert scaled.dtype == np.float32
    assert abs(scaled.mean()) < 1e-5
    assert scaled.std() == pytest.approx(1)


@pytest.mark.parametrize("size", [(23, 31), (40, 20), (9, 64)])
def test_splines_keep_a_parabola_in_place(size):
    """Away from the edges, where a cubic spline is exact; linear interpolation would be an eighth off."""
    shape = (1, 24, 30)
    centres = [(np.arange(new) + 0.5) * old / new - 0.5 for new, old in zip(size, shape[1:], strict=True)]

    def parabola(rows, columns):
        return ((rows - 10) ** 2)[:, None] - 3 * ((columns - 12) ** 2)

    image = parabola(np.arange(24.0), np.arange(30.0))[None].astype(np.float32)
    got = whole(shape, size).image(image, AS_IS)[0]
    inner = np.ix_(*[(c > 8) & (c < old - 9) for c, old in zip(centres, shape[1:], strict=True)])
    np.testing.assert_allclose(got[inner], parabola(*centres)[inner], atol=0.02)


@pytest.mark.parametrize("size", [(13, 17), (5, 29), (7, 8)])
def test_labels_are_the_largest_of_bilinear_classes(size):
    labels = np.random.default_rng(0).integers(0, 4, (2, 9, 11)).astype(np.uint8)
    got = whole(labels.shape, size).labels(labels)
    classes = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 4).movedim(-1, 1).float()
    shares = torch.nn.functional.interpolate(classes, size, mode="bilinear", align_corners=False)
    top = shares.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1] > 1e-4).numpy()
    assert clear.mean() > 0.8
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got[clear], shares.argmax(1).numpy()[clear])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_the_nearest_pixel_is_the_one_below_the_centre(rows, columns, new_rows, new_columns, seed):
    labels = np.random.default_rng(seed).integers(0, 18, (1, rows, columns)).astype(np.uint8)
    got = whole(labels.shape, (new_rows, new_columns)).nearest(labels)[0]
    for y in range(new_rows):
        for x in range(new_columns):
            at = (y + 0.5) * rows / new_rows, (x + 0.5) * columns / new_columns
            near = [labels[0, min(int(at[0] + dy), rows - 1), min(int(at[1] + dx), columns - 1)]
                    for dy in (-1e-5, 1e-5) for dx in (-1e-5, 1e-5)]  # fmt: skip
            assert got[y, x] in near


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    planes = np.ones((1, 4, 4), np.float32)
    with pytest.raises(MissingExtra, match=r"resampling slices needs scipy.*trifuse\[med\]"):
        whole(planes.shape, (5, 5)).image(planes, AS_IS)
    whole(planes.shape, (4, 4)).image(planes, AS_IS)
