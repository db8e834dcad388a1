"""Slices predicted window by window: the way of networks that are trained on patches.

A volume is resampled in plane to the spacing that the network was trained at. Windows that overlap cover each slice,
and their probabilities are averaged, those of a window's middle counting most: by a Gaussian whose standard deviation
is an eighth of its side. With mirroring, a window's probabilities are themselves means over its four mirrorings. They
are then resampled to the native grid, where the most probable class is chosen.

Source: nnU-Net's inference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.architectures.data.samples.nnunet_augmentation import mirroring
from trifuse.architectures.data.samples.patch_dataset import window_starts
from trifuse.architectures.data.samples.preprocessing import Preprocessing, patches_and_spacing
from trifuse.architectures.data.samples.resampled_cases import one_hot_prior
from trifuse.architectures.data.samples.resampling import PlaneGrid
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.data.samples.volume_to_slices import network_input
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.kernels import upsample_argmax

from .inference import evaluating, refuse_non_finite

SIGMA_OF_PATCH = 1 / 8
MIRRORINGS = ((), (-1,), (-2,), (-2, -1))


def sliding_window_inference(
    model: nn.Module,
    volume: Volume,
    preprocessing: Preprocessing,
    side_inputs: SideInputs | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> NDArray[np.uint8]:
    """Return class ids of shape (D, H, W) for a volume of that shape; background outside its non-zero voxels.

    Memory grows with the batch, the labels and a few slices, not with classes times volume.

    Args:
        model: maps (B, C, P, P), with the side inputs by name, to logits (B, K, P, P); one logit is a sigmoid. Moved to
            ``device``; its training mode is restored.
        volume: the volume, slices first.
        preprocessing: as in training: of the values, the size P of patches, their spacing, step and mirroring.
        side_inputs: what the case brings beside its image: windows get a part of the prior, mirrored with the image,
            the constants as they are, and, where it is asked for, how they were mirrored.
        batch_size: windows at a time.
        device: where to run; by default where the model's parameters are.

    Raises:
        NumericError: a logit is not finite; the slices are named.
        MissingExtra: scipy is not installed.
    """
    patches, spacing_mm = patches_and_spacing(preprocessing)
    side_inputs = side_inputs or SideInputs()
    grid = PlaneGrid.of(volume, spacing_mm)
    slices = torch.from_numpy(grid.image(volume.voxels, preprocessing))
    segments = None if side_inputs.prior is None else torch.from_numpy(grid.nearest(side_inputs.prior))
    windows = Windows(grid.size, preprocessing.image_size, patches.step)
    labels = np.zeros(volume.voxels.shape, np.uint8)
    inside = labels[grid.box]
    with evaluating(model, device) as where, torch.inference_mode():
        network = _Network(model, where, preprocessing, side_inputs, patches.mirror, first_slice=grid.box[0].start)
        for part, probabilities in _probabilities(network, slices, segments, windows, batch_size):
            inside[part] = upsample_argmax([probabilities], inside.shape[1:]).cpu().numpy()
    return labels


def _probabilities(
    network: _Network, slices: Tensor, segments: Tensor | None, windows: Windows, batch_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few slices at a time: which, and their probabilities (n, K, h, w)."""
    count = len(windows.squares)
    at_once = max(1, batch_size // count)
    for start in range(0, len(slices), at_once):
        part = slice(start, start + at_once)
        image = windows.cut(slices[part])
        prior = None if segments is None else windows.cut(segments[part])
        found = []
        for first in range(0, len(image), batch_size):
            batch = slice(first, first + batch_size)
            shown = [start + index // count for index in range(len(image))[batch]]
            found.append(network.probabilities(image[batch], None if prior is None else prior[batch], shown))
        yield part, windows.average(torch.cat(found))


class Windows:
    """The windows that cover slices of one size, and what each of their pixels counts."""

    def __init__(self, size: tuple[int, int], side: int, step: float) -> None:
        self.size = size
        self.before = [max(0, -window_starts(length, side, step)[0]) for length in size]  # zeros around small slices
        self.padded = [max(length, side) for length in size]
        starts = (window_starts(length, side, step) for length in self.padded)
        self.squares = [tuple(slice(at, at + side) for at in corner) for corner in product(*starts)]
        self.weights = window_weights(side)

    def cut(self, slices: Tensor) -> Tensor:
        """Return the windows (n * windows, P, P) of slices (n, h, w), slice by slice."""
        (top, left), (rows, columns) = self.before, self.size
        padded = slices.new_zeros(len(slices), *self.padded)
        padded[:, top : top + rows, left : left + columns] = slices
        return torch.stack([padded[:, rows, columns] for rows, columns in self.squares], dim=1).flatten(0, 1)

    def average(self, maps: Tensor) -> Tensor:
        """Return the weighted mean (n, K, h, w) of maps (n * windows, K, P, P)."""
        weights = self.weights.to(maps.device)
        by_slice = maps.unflatten(0, (-1, len(self.squares)))
        total, weight = maps.new_zeros(len(by_slice), maps.shape[1], *self.padded), maps.new_zeros(self.padded)
        for number, (rows, columns) in enumerate(self.squares):
            total[:, :, rows, columns] += by_slice[:, number] * weights
            weight[rows, columns] += weights
        (top, left), (height, width) = self.before, self.size
        return (total / weight)[:, :, top : top + height, left : left + width].contiguous()


def window_weights(side: int) -> Tensor:
    """Return what each pixel of a window counts, (P, P): a Gaussian about its centre."""
    distance = torch.arange(side) - (side - 1) / 2
    along = torch.exp(-0.5 * (distance / (side * SIGMA_OF_PATCH)) ** 2)
    return along[:, None] * along


class _Network(NamedTuple):
    """A network and what it needs to answer for windows of one case."""

    model: nn.Module
    device: torch.device
    preprocessing: Preprocessing
    side_inputs: SideInputs
    mirror: bool
    first_slice: int

    def probabilities(self, image: Tensor, segments: Tensor | None, slices: Sequence[int]) -> Tensor:
        """Return the probabilities (B, K, P, P) of windows (B, P, P), their mean over the mirrorings."""
        constants = {name: value.to(self.device) for name, value in self.side_inputs.constants.items()}
        inputs: dict[str, Tensor] = {name: one.expand(len(image), *one.shape) for name, one in constants.items()}
        image = network_input(image, self.preprocessing).to(self.device)
        prior = None if segments is None else one_hot_prior(segments.to(self.device))
        mirrorings = MIRRORINGS if self.mirror else MIRRORINGS[:1]
        total = []
        for axes in mirrorings:
            if prior is not None:
                inputs["prior"] = prior.flip(axes)
            if self.side_inputs.transform:
                matrix = F.pad(mirroring(axes), (0, 1)).to(self.device)
                inputs["transform"] = matrix.expand(len(image), *matrix.shape)
            logits = self.model(image.flip(axes), **inputs).float()
            refuse_non_finite([logits], [self.first_slice + at for at in slices])
            total.append(_softmax(logits).flip(axes))
        return torch.stack(total).mean(dim=0)


def _softmax(logits: Tensor) -> Tensor:
    """Return the probabilities of all classes; one logit is that of the foreground, against zero."""
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return logits.softmax(dim=1)
