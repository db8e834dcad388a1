"""Slices predicted window by window: the way of networks that are trained on patches.

A volume is resampled in plane to the spacing that the network was trained at. Windows that overlap cover each slice,
and their probabilities are averaged, those of a window's middle counting most: by a Gaussian whose standard deviation
is an eighth of its side. With mirroring, a window's probabilities are themselves means over its four mirrorings. They
are then resampled to the native grid, where the most probable class is chosen.

Source: nnU-Net's inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trifuse.kernels import upsample_argmax

from .inference import evaluating, refuse_non_finite

if TYPE_CHECKING:
    from trifuse.architectures.data.extras import CaseExtras
    from trifuse.architectures.data.patches import Patches
    from trifuse.architectures.data.preparation import Preparation
    from trifuse.architectures.data.volume import Volume

SIGMA_OF_PATCH = 1 / 8
_MIRRORED_AXES = ((), (-1,), (-2,), (-2, -1))


def predict_by_windows(
    model: nn.Module,
    volume: Volume,
    patch_size: int,
    *,
    patches: Patches,
    preparation: Preparation,
    extras: CaseExtras | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> NDArray[np.uint8]:
    """Return class ids of shape (D, H, W) for a volume of that shape; background outside its non-zero voxels.

    Memory grows with the batch, the labels and a few slices, not with classes times volume.

    Args:
        model: maps (B, C, P, P), with the extras by name, to logits (B, K, P, P); one logit is a sigmoid. Moved to
            ``device``; its training mode is restored.
        volume: the volume, slices first.
        patch_size: P, as in training.
        patches: spacing, step and mirroring.
        preparation: of the values, as in training.
        extras: what the case brings beside its image: every batch gets its part of the prior, mirrored with the image,
            and the constants as they are.
        batch_size: windows at a time.
        device: where to run; by default where the model's parameters are.

    Raises:
        NumericError: a logit is not finite; the slices are named.
        MissingExtra: scipy is not installed.
    """
    from trifuse.architectures.data.extras import CaseExtras
    from trifuse.architectures.data.resampling import PlaneGrid

    if patches.spacing_mm is None:
        raise ValueError("patches.spacing_mm: expected that of the training, got None")
    extras = extras or CaseExtras()
    grid = PlaneGrid.of(volume, patches.spacing_mm)
    slices = torch.from_numpy(grid.image(volume.voxels, preparation))
    prior = None if extras.prior is None else torch.from_numpy(grid.nearest(extras.prior))
    labels = np.zeros(volume.voxels.shape, np.uint8)
    inside = labels[grid.box]
    with evaluating(model, device) as where, torch.inference_mode():
        network = _Network(model, where, preparation, extras, patches.mirror, grid.box[0].start)
        for part, probabilities in _probabilities(network, slices, prior, patch_size, patches.step, batch_size):
            inside[part] = upsample_argmax([probabilities], inside.shape[1:]).cpu().numpy()
    return labels


class _Network(NamedTuple):
    """A network and what it needs to answer for windows of one case."""

    model: nn.Module
    device: torch.device
    preparation: Preparation
    extras: CaseExtras
    mirror: bool
    first_slice: int

    def probabilities(self, image: Tensor, prior: Tensor | None, slices: list[int]) -> Tensor:
        """Return the probabilities (B, K, P, P) of windows (B, P, P), their mean over the mirrorings."""
        from trifuse.architectures.data.patches import one_hot_prior
        from trifuse.architectures.data.preparation import network_input

        inputs: dict[str, Any] = {
            name: value.to(self.device).expand(len(image), *value.shape)
            for name, value in self.extras.constants.items()
        }
        image = network_input(image, self.preparation).to(self.device)
        channels = None if prior is None else one_hot_prior(prior.to(self.device))
        axes = _MIRRORED_AXES if self.mirror else _MIRRORED_AXES[:1]
        total: Any = 0
        for flipped in axes:
            if channels is not None:
                inputs["prior"] = channels.flip(flipped)
            logits = self.model(image.flip(flipped), **inputs).float()
            refuse_non_finite([logits], [self.first_slice + at for at in slices])
            total = total + _softmax(logits).flip(flipped)
        return total / len(axes)


def _softmax(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return logits.softmax(dim=1)


def _probabilities(
    network: _Network, slices: Tensor, prior: Tensor | None, patch_size: int, step: float, batch_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few slices at a time: which, and their probabilities (n, K, h, w)."""
    from trifuse.architectures.data.patches import window_starts

    depth, *size = slices.shape
    below = [max(0, -((length - patch_size) // 2)) for length in size]  # zeros before and after a slice
    above = [max(0, patch_size - length - before) for length, before in zip(size, below, strict=True)]
    padding = (below[1], above[1], below[0], above[0])
    padded_size = [sum(lengths) for lengths in zip(size, below, above, strict=True)]
    corners = list(product(*(window_starts(length, patch_size, step) for length in padded_size)))
    weights = window_weights(patch_size).to(network.device)
    at_once = max(1, batch_size // len(corners))
    for start in range(0, depth, at_once):
        part = slice(start, min(start + at_once, depth))
        image = nn.functional.pad(slices[part], padding)
        segments = None if prior is None else nn.functional.pad(prior[part], padding)
        windows = [(at, corner) for at in range(len(image)) for corner in corners]
        summed: Any = None
        covered = torch.zeros(padded_size, device=network.device)
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]

            def cut(planes: Tensor, batch: Any = batch) -> Tensor:
                return torch.stack([planes[(at, *_square(corner, patch_size))] for at, corner in batch])

            named = [start + at for at, _ in batch]
            found = network.probabilities(cut(image), None if segments is None else cut(segments), named)
            if summed is None:
                summed = found.new_zeros(len(image), found.shape[1], *padded_size)
            for one, (at, corner) in zip(found, batch, strict=True):
                summed[(at, slice(None), *_square(corner, patch_size))] += one * weights
        for corner in corners:
            covered[_square(corner, patch_size)] += weights
        mean = summed / covered
        yield part, mean[:, :, below[0] : below[0] + size[0], below[1] : below[1] + size[1]].contiguous()


def _square(corner: tuple[int, ...], side: int) -> tuple[slice, slice]:
    rows, columns = corner
    return slice(rows, rows + side), slice(columns, columns + side)


def window_weights(patch_size: int) -> Tensor:
    """Return what each pixel of a window counts, (P, P): a Gaussian about its centre."""
    distance = torch.arange(patch_size) - (patch_size - 1) / 2
    along = torch.exp(-0.5 * (distance / (patch_size * SIGMA_OF_PATCH)) ** 2)
    return along[:, None] * along
