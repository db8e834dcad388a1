"""What nnU-Net would say of the grids of a case's files."""

from __future__ import annotations

import numpy as np

from trifuse.architectures.data.volumes.nifti import read_image
from trifuse.architectures.data.volumes.volume import Volume, match_grids
from trifuse.kernels.errors import DataError

from .cohort import Case


def compare_with_nnunet(case: Case, image: Volume, labels: Volume | None) -> tuple[list[DataError], list[str]]:
    """Return what nnU-Net would refuse, or warn of, when it compares the grids of a case's files.

    It takes spacings and affines for different that are further apart than rounding, which matters to nothing here.
    """
    errors: list[DataError] = []
    warnings: list[str] = []
    others = [labels] if labels is not None else []
    for path in case.other_channels:
        try:
            channel = read_image(path, frame=case.frame)
            match_grids(path, channel.geometry, image)
            others.append(channel)
        except DataError as error:
            errors.append(error)
    for other in others:
        if not np.allclose(other.spacing_mm, image.spacing_mm):
            want = f"{image.spacing_mm} mm, as {image.path}"
            hint = "nnU-Net refuses this case"
            errors.append(DataError(other.path, "spacing", got=f"{other.spacing_mm} mm", want=want, hint=hint))
        elif not np.allclose(other.geometry.affine, image.geometry.affine):
            warnings.append(f"{other.path}: affine: not quite that of {image.path}: nnU-Net will warn")
    return errors, warnings
