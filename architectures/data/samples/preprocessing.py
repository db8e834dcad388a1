"""How a volume becomes the slices that a network sees, and how its labels come back: the same in training and use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trifuse.architectures.data.volumes.volume import Volume
from trifuse.kernels.errors import MissingExtra

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_PERCENTILES = (1.0, 99.0)

_SLICES_AT_ONCE = 16


@dataclass(frozen=True)
class Preprocessing:
    """How slices are prepared.

    Attributes:
        intensity: what becomes of a volume's values: clipped to its 1st and 99th percentile and scaled to [0, 1]
            (``"percentiles"``); clipped to ``window`` and scaled to [0, 1] (``"window"``); scaled to [0, 1]
            (``"minmax"``); mean 0 and standard deviation 1 (``"zscore"``); left alone (``"as_is"``), for files that
            were prepared before, such as those of the Synapse package.
        window: lowest and highest value that are told apart, in the image's unit; (-125, 275) HU for abdominal CT.
        resize: ``"linear"`` (bilinear and antialiased, labels by the nearest neighbour; pixels are areas) or
            ``"cubic"`` (cubic spline, labels of order 0; the centres of the corner pixels stay where they are).
            Splines overshoot, which is not clipped.
        channels: 3, the image repeated and normalised as ImageNet encoders expect, or 1, the image alone.
        restore: how predictions get back to the image's size: ``"logits"`` are interpolated bilinearly before the
            argmax, or ``"labels"`` are chosen first and resized as ``resize`` does it with labels.

    Raises:
        ValueError: a window that is not needed, or is needed and missing or empty.
    """

    intensity: Literal["percentiles", "window", "minmax", "zscore", "as_is"] = "percentiles"
    window: tuple[float, float] | None = None
    resize: Literal["linear", "cubic"] = "linear"
    channels: Literal[1, 3] = 3
    restore: Literal["logits", "labels"] = "logits"

    def __post_init__(self) -> None:
        if self.intensity != "window":
            if self.window is not None:
                raise ValueError(f"window: expected none with intensity = {self.intensity!r}, got {self.window}")
        elif self.window is None or not -math.inf < self.window[0] < self.window[1] < math.inf:
            want = "its lowest and highest value, such as (-125, 275) HU"
            raise ValueError(f"window: expected {want} with intensity = 'window', got {self.window}")


def preprocess_volume(volume: Volume, image_size: int, preprocessing: Preprocessing | None = None) -> Tensor:
    """Return the slices of a volume as network input of shape (D, channels, S, S), float32."""
    return network_input(scaled_slices(volume, image_size, preprocessing), preprocessing)


def scaled_slices(volume: Volume, image_size: int, preprocessing: Preprocessing | None = None) -> Tensor:
    """Return the slices of a volume, their values scaled and their size S x S, of shape (D, S, S), float32.

    A volume without contrast gives zeros.

    Raises:
        MissingExtra: cubic resizing without scipy.
    """
    preprocessing = preprocessing or Preprocessing()
    slices = torch.empty(volume.voxels.shape[0], image_size, image_size)
    for part, scaled in _scaled_parts(volume.voxels, preprocessing):
        slices[part] = _RESIZE[preprocessing.resize](scaled, image_size)
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
    if preprocessing.intensity == "zscore":
        return low, high, voxels.mean(dtype=np.float64), voxels.std(dtype=np.float64)
    if preprocessing.intensity == "percentiles":
        low, high = np.percentile(voxels, CLIP_PERCENTILES)
    elif preprocessing.intensity == "minmax":
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
