"""Input-image integration: the image, after one convolution, at the size of a decoder stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .conv_norm_relu import ConvNormReLU, init_convs
from .image_input import check_map
from .plain_layers import dtype_of


class ImageBranch(nn.Module):
    """Bring an image to a decoder stage: ``ReLU(norm(conv3x3(resize(image))))``.

    Args:
        out_dim: channels of the result, those of the stage.
        in_dim: channels of the image.
        norm: ``"batch"``, ``"instance"`` or ``"group"``.
        conv_then_resize: convolve at the image's own size and resize the result, instead of resizing the image first.

    Source: the spatial integration of the input image in left-atrium segmentation with DINOv2, section II-C.
    """

    def __init__(self, out_dim: int, in_dim: int = 3, norm: str = "batch", conv_then_resize: bool = False) -> None:
        super().__init__()
        self.in_dim, self.conv_then_resize = in_dim, conv_then_resize
        self.conv = ConvNormReLU(in_dim, out_dim, norm)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from He's normal distribution over the fan-out."""
        init_convs(self, generator)

    def forward(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Turn an image (B, in_dim, H, W) of any floating type into (B, out_dim, *size), in the type of the weights."""
        check_map("ImageBranch", "image", image, self.in_dim)
        dtype = dtype_of(self.conv)
        if self.conv_then_resize:
            return resize_bilinear(self.conv(image.to(dtype)), size)
        features: Tensor = self.conv(resize_bilinear(image, size).to(dtype))
        return features


def resize_bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, H, W) bilinearly, corners not aligned, low-pass filtered along with any side that shrinks.

    Computed in float32 or wider: the filter has no bfloat16 form on a CPU.
    """
    height, width = x.shape[-2:]
    if size == (height, width):
        return x
    shrinks = size[0] < height or size[1] < width
    compute_dtype = torch.promote_types(x.dtype, torch.float32) if shrinks else x.dtype
    return F.interpolate(x.to(compute_dtype), size=size, mode="bilinear", antialias=shrinks).to(x.dtype)
