"""What a network is given of a case beside its image: an anatomical prior, and values that all its slices share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trifuse.architectures.storage.safetensors_file import digest_of_tensors
from trifuse.kernels.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SideInputs:
    """What a case brings beside its image.

    Attributes:
        prior: AHA segment of every voxel, 0 (none) to 17, uint8 of shape (D, H, W), on the grid of the image as it is
            shown; None for networks without a prior. A sample gets it as ``"prior"`` of shape (17, S, S), one-hot.
        constants: tensors that every slice of the case gets under these names, such as ``"ecg"`` (12, T) float32,
            ``"interval"`` () float32 in days and ``"has_ecg"`` () bool.
        notes: what is odd about them, for people; they change no result.
        transform: whether samples say how their image was mirrored and turned, as ``"transform"`` (2, 3) float32: where
            each position of it lay before, in coordinates x and y from -1 to 1 over the patch, as
            `torch.nn.functional.affine_grid` takes it.
    """

    prior: NDArray[np.uint8] | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    transform: bool = False

    def digest(self) -> str:
        """Return a SHA-256 of all that it holds."""
        prior = {} if self.prior is None else {"prior": torch.from_numpy(np.ascontiguousarray(self.prior))}
        return digest_of_tensors({**prior, **self.constants})


def side_inputs_of(side_inputs: Mapping[str, T], case_id: str) -> T:
    """Return what a case brings.

    Raises:
        DataError: it is not said.
    """
    if case_id not in side_inputs:
        raise DataError(case_id, "side_inputs", got="none", want="a prior, an ECG or both, as for the other cases")
    return side_inputs[case_id]
