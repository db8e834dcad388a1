"""Small studies on disk."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from trifuse.architectures.data.nifti import new_volume, write_image, write_labels

SHAPE = (8, 7, 4)
AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])


@pytest.fixture
def put_case(tmp_path):
    """Return a function that writes one case of a plain study below ``tmp_path`` and returns its labels (D, H, W)."""

    def put(
        name, labels="ball", seed=None, affine=AFFINE, shape=SHAPE, suffix=".nii.gz", root=tmp_path, image_name=None
    ):
        for folder in ("images", "labels") if labels is not None else ("images",):
            (root / folder).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(zlib.crc32(name.encode()) if seed is None else seed)
        grid = new_volume(rng.integers(0, 1000, shape).astype(np.int16), affine)
        write_image(root / "images" / f"{image_name or name}{suffix}", grid.voxels, like=grid)
        if labels is None:
            return None
        if isinstance(labels, str):
            labels = np.zeros(grid.voxels.shape, np.uint8)
            labels[1:3, 2:5, 2:6] = 1
        write_labels(root / "labels" / f"{name}{suffix}", labels, like=grid)
        return labels

    return put
