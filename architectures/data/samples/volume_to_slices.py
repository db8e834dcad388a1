"""A volume becomes the slices that a network sees, and its labels come back to the volume's size."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trifuse.architectures.data.volumes.volume import Volume
from trifuse.kernels.errors import MissingExtra

from .preprocessing import Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SLICES_AT_ONCE = 16


def preprocess_volume(volume: Volume, preprocessing: Preprocessing) -> Tensor:
    """Return the slices of a volume as network input of shape (D, channels, S, S), float32."""
    return network_input(scaled_slices(volume, preprocessing), preprocessing)


def scaled_slices(volume: Volume, preprocessing: Preprocessing) -> Tensor:
    """Return the slices of a volume, their values scaled and their size S x S, of shape (D, S, S), float32.

    A volume without contrast gives zeros.

    Raises:
        MissingExtra: cubic resizing without scipy.
    """
    side = preprocessing.image_size
    slices = torch.empty(volume.voxels.shape[0], side, side)
    for part, scaled in _scaled_parts(volume.voxels, preprocessing):
        slices[part] = _RESIZE[preprocessing.resize](scaled, side)
    return slices


def scaled_voxels(voxels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Return voxels (D, H, W), their values scaled as the preprocessing has it, float32; without contrast zeros."""
    scaled = np.empty(voxels.shape, np.float32)
    for part, values in _scaled_parts(voxels, preprocessing):
        scaled[part] = values
    return scaled


def network_input(slices: Tensor, preprocessing: Preprocessing | None = None) -> Tensor:
    """Turn scaled slices (..., S, S) into what the network gets, (..., channels, S, S)."""
    if preprocessing is not None and preprocessing.channels == 1:
        return slices.unsqueeze(-3)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (slices.unsqueeze(-3) - mean) / std


def resized_labels(labels: np.ndarray, size: tuple[int, int], preprocessing: Preprocessing | None = None) -> np.ndarray:
    """Resize every slice of a label map (D, H, W) to ``size``, each pixel taking the value of one pixel before.

    To S x S and back again, values land on the grid that ``scaled_slices`` puts the image on.
    """
    corners = preprocessing is not None and preprocessing.resize == "cubic"
    rows, columns = (_sources(old, new, corners) for old, new in zip(labels.shape[1:], size, strict=True))
    return labels[:, rows[:, None], columns]


def _scaled_parts(voxels: np.ndarray, preprocessing: Preprocessing) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield a few slices at a time: which, and their scaled values in float32."""
    low, high, offset, scale = _scaling(voxels, preprocessing)
    for start in range(0, len(voxels), _SLICES_AT_ONCE):
        chosen = slice(start, start + _SLICES_AT_ONCE)
        part = voxels[chosen]
        scaled = (part.clip(low, high) - offset) / scale if scale > 0 else np.zeros_like(part)
        yield chosen, scaled.astype(np.float32)


def _scaling(voxels: np.ndarray, preprocessing: Preprocessing) -> tuple[np.float64, np.float64, np.float64, np.float64]:
    """Return what values are clipped to, what is then subtracted, and what they are divided by (0: no contrast)."""
    low, high = np.float64(-np.inf), np.float64(np.inf)
    if preprocessing.intensity == "as_is":
        return low, high, np.float64(0), np.float64(1)
    if preprocessing.clip_percentiles is not None:
        low, high = np.percentile(voxels, preprocessing.clip_percentiles)
    if preprocessing.intensity == "zscore":
        clipped = voxels if preprocessing.clip_percentiles is None else voxels.clip(low, high)
        return low, high, clipped.mean(dtype=np.float64), clipped.std(dtype=np.float64)
    if preprocessing.intensity == "minmax":
        low, high = np.float64(voxels.min()), np.float64(voxels.max())
    elif preprocessing.window is not None:
        low, high = (np.float64(value) for value in preprocessing.window)
    return low, high, low, high - low


def _resize_linear(planes: np.ndarray, image_size: int) -> Tensor:
    size = (image_size, image_size)
    return F.interpolate(torch.from_numpy(planes)[:, None], size=size, mode="bilinear", antialias=True)[:, 0]


def _resize_cubic(planes: np.ndarray, image_size: int) -> Tensor:
    if planes.shape[1:] == (image_size, image_size):
        return torch.from_numpy(planes)
    try:
        zoom = import_module("scipy.ndimage").zoom
    except ImportError as error:
        raise MissingExtra("scipy", "med", "cubic resizing") from error
    # The default mode makes the last row and column zero at sizes where rounding puts them outside (512 to 224).
    factors = [image_size / length for length in planes.shape[1:]]
    return torch.from_numpy(np.stack([zoom(plane, factors, order=3, mode="mirror") for plane in planes]))


_RESIZE = {"linear": _resize_linear, "cubic": _resize_cubic}


def _sources(old: int, new: int, corners: bool) -> np.ndarray:
    """Return which of ``old`` pixels each of ``new`` pixels lies nearest to."""
    if not corners:  # pixels are areas; in float32, as torch's "nearest-exact" computes it
        centres = np.arange(new, dtype=np.float32) + np.float32(0.5)
        return np.minimum(centres * np.float32(old / new), old - 1).astype(int)
    step = (old - 1) / (new - 1) if new > 1 else 0.0
    return np.floor(np.arange(new) * step + 0.5).astype(int)
