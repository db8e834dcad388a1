"""A cohort of small volumes on disk whose truth is the bright part of the image, and a network that knows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trifuse.architectures.data.layouts.cohort import Cohort
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.volumes.nifti import new_volume, write_image, write_labels

SPACING_MM = (1.25, 1.5, 8.0)  # of the native axes i, j, k


class Threshold(nn.Module):
    """Two logits per pixel, the second positive where the normalised image is bright; half resolution on demand."""

    def __init__(self, at: float = 1.0, shrink: int = 1) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at))
        self.shrink = shrink
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape))
        bright = nn.functional.avg_pool2d(image[:, :1], self.shrink) - self.at
        return torch.cat([-bright, bright], dim=1)


def write_case(root: Path, name: str, *, depth: int = 4, box: tuple[int, int] = (6, 16), empty: bool = False) -> None:
    """Write ``images/<name>`` and ``labels/<name>``: a bright box in the middle slices of a dark volume."""
    rng = np.random.default_rng(sum(map(ord, name)))
    native = rng.normal(100, 3, (24, 20, depth)).astype(np.float32)
    labels = np.zeros(native.shape, np.uint8)
    if not empty:
        labels[box[0] : box[1], 5:15, 1 : depth - 1] = 1
    native[labels == 1] += 400
    affine = np.diag([-SPACING_MM[0], SPACING_MM[1], SPACING_MM[2], 1.0])
    affine[:3, 3] = 11.0, -7.0, 3.0
    image = new_volume(native, affine)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_image(root / "images" / f"{name}.nii.gz", image.voxels, image)
    write_labels(root / "labels" / f"{name}.nii.gz", new_volume(labels, affine).voxels, image)


@pytest.fixture
def make_cohort(tmp_path: Path) -> Callable[..., Cohort]:
    """Return a function that writes cases of these names and opens them as a cohort."""

    def make(*names: str, **options) -> Cohort:
        for name in names:
            write_case(tmp_path / "cohort", name, **options)
        return open_cohort(tmp_path / "cohort", "plain")

    return make


@pytest.fixture
def threshold() -> type[Threshold]:
    """Return the network class."""
    return Threshold
