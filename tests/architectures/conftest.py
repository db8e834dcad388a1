"""Small cohorts on disk."""

from __future__ import annotations

import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from trifuse.architectures.data.phantoms.scar import write_scar_phantom
from trifuse.architectures.data.volumes.nifti import new_volume, write_image, write_labels

SHAPE = (8, 7, 4)
SCAR_CASES, SCAR_SIZE = 7, (48, 48, 5)
AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])


@pytest.fixture(scope="session")
def scar_cohort(tmp_path_factory) -> Path:
    """Return the folder of a cohort of four cases to train on, one to validate and two to test."""
    folder = tmp_path_factory.mktemp("scars") / "phantom"
    write_scar_phantom(folder, SCAR_CASES, 0, SCAR_SIZE, val=1, test=2)
    return folder


@pytest.fixture
def put_case(tmp_path):
    """Return a function that writes one case of a plain cohort below ``tmp_path`` and returns its labels (D, H, W)."""

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


@pytest.fixture
def put_synapse(tmp_path):
    """Return a function that writes a Synapse package below ``tmp_path`` and returns the labels (D, H, W) by case."""

    def put(train=("case0005", "case0010"), test=("case0008",), root=tmp_path, shape=(3, 12, 9), values=range(9)):
        written = {}
        for folder in ("train_npz", "test_vol_h5", "lists_Synapse"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for name in (*train, *test):
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            image = rng.random(shape, dtype=np.float32)
            written[name] = labels = rng.choice(np.array(values), shape).astype(np.float32)
            labels.flat[: len(values)] = values
            if name in test:
                with h5py.File(root / "test_vol_h5" / f"{name}.npy.h5", "w") as file:
                    file["image"], file["label"] = image, labels
            if name in train:
                for number in range(len(image)):
                    path = root / "train_npz" / f"{name}_slice{number:03d}.npz"
                    np.savez(path, image=image[number], label=labels[number])
        slices = [f"{name}_slice{number:03d}" for name in train for number in range(shape[0])]
        (root / "lists_Synapse" / "train.txt").write_text("\n".join(slices) + "\n")
        (root / "lists_Synapse" / "test_vol.txt").write_text("".join(f"{name}\n" for name in test))
        return written

    return put
