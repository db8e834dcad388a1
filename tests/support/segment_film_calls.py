"""Arguments of the segment FiLM gate, whose tests lie in two files."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
NAMES = ("features", "shared", "segment_scores", "direction", "weights", "scale", "shift")  # what gets a gradient
NOTHING = (False,) * len(NAMES)
every_backend = pytest.mark.parametrize("name", BACKENDS)

LAYOUTS = {
    "planes": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns of a wider map": lambda x: torch.cat([x, x], 3)[..., 1 : x.shape[3] + 1],
    "some channels of a map": lambda x: torch.cat([x, x], 1)[:, 1 : x.shape[1] + 1],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one map for all samples": lambda x: x[:1].expand_as(x),
    "one column": lambda x: x[..., :1],
}


def shapes_of(shape: Sequence[int], count: int = 17) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the arguments that get a gradient, for maps of a shape and a number of segments."""
    batch, channels = shape[:2]
    rows = (batch, channels)
    return tuple(shape), rows, (batch, count), (channels,), (batch, 2), rows, rows


def random_arguments(
    shape: Sequence[int] = (2, 3, 4, 5),
    dtype: torch.dtype = torch.float32,
    needed: Sequence[bool] = (True,) * len(NAMES),
    *,
    count: int = 17,
    layout: str = "planes",
    seed: int = 0,
) -> list[Tensor]:
    """Draw the eight arguments, each label from 0 to ``count`` among others where the map has as many positions."""
    generator = torch.Generator().manual_seed(seed)
    features, *small = (torch.randn(size, generator=generator) for size in shapes_of(shape, count))
    segments = torch.randint(0, count + 1, (shape[0], *shape[2:]), generator=generator, dtype=torch.uint8)
    features, *small = (
        value.requires_grad_(need)
        for value, need in zip((LAYOUTS[layout](features.to(dtype)), *small), needed, strict=True)
    )
    return [features, segments, *small]


def leaves_of(arguments: Sequence[Tensor]) -> list[Tensor]:
    """Return the arguments that get a gradient, in the order of `NAMES`."""
    return [arguments[0], *arguments[2:]]
