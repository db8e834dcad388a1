"""One stage of a U-Net decoder: double the resolution, join what comes from the side, convolve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trifuse.kernels.errors import ShapeError
from trifuse.kernels.scalars import check_listed

from .conv_norm_relu import ConvNormReLU, init_convs
from .image_input import check_map


class UNetDecoderStage(nn.Module):
    """Double the resolution of a map and fuse it with side maps: (B, in_dim, H, W) -> (B, out_dim, 2H, 2W).

    The map is upsampled by a learned transposed convolution; the side maps and it, in this order, are concatenated and
    convolved.

    Args:
        in_dim: channels of the map that comes from the stage below.
        out_dim: channels of the result, and of the upsampled map.
        side_dims: channels of each side map, in the order in which they will be given.
        convs: number of convolutions after the concatenation; 2 is the classic double convolution.
        norm: ``"batch"``, ``"instance"`` or ``"group"``.

    Raises:
        ShapeError: one number instead of a sequence of ``side_dims``.
        ValueError: no convolution, or an unknown norm.

    Source: Ronneberger et al., U-Net, section 2; left-atrium segmentation with DINOv2, Eq. 3 (order of the maps).
    """

    def __init__(
        self, in_dim: int, out_dim: int, side_dims: Sequence[int], convs: int = 1, norm: str = "batch"
    ) -> None:
        super().__init__()
        if convs < 1:
            raise ValueError(f"UNetDecoderStage: expected at least one convolution, got convs={convs}")
        check_listed("UNetDecoderStage: side_dims", side_dims)
        self.in_dim, self.side_dims = in_dim, tuple(side_dims)
        self.up = nn.ConvTranspose2d(in_dim, out_dim, kernel_size=2, stride=2)
        joined_dim = out_dim + sum(side_dims)
        self.convs = nn.Sequential(
            *(ConvNormReLU(joined_dim if i == 0 else out_dim, out_dim, norm) for i in range(convs))
        )
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights from He's normal distribution over the fan-out."""
        init_convs(self, generator)

    def forward(self, x: Tensor, sides: Sequence[Tensor]) -> Tensor:
        """Fuse ``x`` (B, in_dim, H, W) with side maps (B, side_dim, 2H, 2W) into (B, out_dim, 2H, 2W).

        Raises:
            ShapeError: ``x`` is not such a map, or the side maps are not as many, as wide or as large as expected.
        """
        check_map("UNetDecoderStage", "x", x, self.in_dim)
        up = self.up(x)
        wanted = [(x.shape[0], dim, *up.shape[-2:]) for dim in self.side_dims]
        got = [tuple(side.shape) for side in sides]
        if got != wanted:
            raise ShapeError(f"UNetDecoderStage: expected side maps of shapes {wanted}, got {got}")
        out: Tensor = self.convs(torch.cat([*sides, up], dim=1))
        return out
