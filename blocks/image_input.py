"""Checks of the images and maps that networks and blocks are given, and the layout in which they are convolved."""

from __future__ import annotations

import torch
from torch import Tensor

from trifuse.kernels.errors import ShapeError


def check_image(network: str, image: Tensor, channels: int) -> None:
    """Refuse anything but a batch of floating-point images (B, channels, H, W).

    Raises:
        ShapeError: other dimensions or channels, with a guess at what went wrong.
        TypeError: the images are not of a floating-point type, and so cannot have been normalised.
    """
    wanted = f"expected images of shape (B, {channels}, H, W), got {tuple(image.shape)}"
    if image.ndim != 4:
        hint = "; add the batch dimension with image[None]" if image.ndim == 3 else ""
        raise ShapeError(f"{network}: {wanted}{hint}")
    if image.shape[1] != channels:
        hint = ""
        if image.shape[3] == channels:
            hint = "; channels come second: use image.permute(0, 3, 1, 2)"
        elif image.shape[1] == 1:
            hint = "; a network for grey images is built with in_channels=1"
        raise ShapeError(f"{network}: {wanted}{hint}")
    if not image.is_floating_point():
        raise TypeError(f"{network}: expected normalised floating-point images, got {image.dtype}; use image.float()")


def check_map(block: str, name: str, x: Tensor, channels: int) -> None:
    """Refuse anything but maps (B, channels, H, W).

    Raises:
        ShapeError: other dimensions or channels, naming the argument and how channels-last data get there.
    """
    if x.ndim != 4 or x.shape[1] != channels:
        raise ShapeError(
            f"{block}: {name} has shape {tuple(x.shape)}; expected (B, {channels}, H, W); bring channels-last data "
            "there with x.permute(0, 3, 1, 2)"
        )


def channels_last(x: Tensor) -> Tensor:
    """Return a map (B, C, H, W) with channels innermost in memory, as a copy, also where it has one channel.

    Convolutions, and batch norms, keep the layout that they find, so that one copy in front of a network decides it for
    all maps; weights, gradients and checkpoints stay as they are.

    Mind other norms: on a CPU, PyTorch's group norm, also as an instance norm, takes the variance from the mean of
    squares in this layout, and loses one to two digits, while batch norm loses fewer; on a GPU it copies the map to the
    other layout and leaves it there.
    """
    return x.clone(memory_format=torch.channels_last)
