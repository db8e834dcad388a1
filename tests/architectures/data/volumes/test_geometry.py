"""Where a point of a slice is shown."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from trifuse.architectures.data.volumes.nifti import new_volume

SIZES = (5, 6, 7)


@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3)))
@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("slice_axis", range(3))
def test_a_point_is_shown_where_its_voxel_is(order, signs, slice_axis):
    """However a file's axes run, the point (x, y) lies on the voxel with these native indices."""
    native = np.zeros(SIZES, np.uint8)
    place = [4, 2, 1]
    native[tuple(place)] = 1
    affine = np.eye(4)
    spacing = np.where(np.arange(3) == slice_axis, 8.0, 1.5)
    affine[:3, :3] = (np.eye(3)[list(order)] * signs).T * spacing
    volume = new_volume(native, affine)
    x, y = (index for axis, index in enumerate(place) if axis != slice_axis)
    shown = tuple(np.argwhere(volume.voxels)[0, 1:].tolist())
    assert volume.geometry.display_point((x, y)) == shown
    shifted = volume.geometry.display_point((x + 0.25, y))
    assert np.abs(np.subtract(shifted, shown)).sum() == 0.25
