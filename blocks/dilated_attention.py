"""Multi-scale dilated attention: local self-attention whose heads look at windows of several dilations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.kernels import ShapeError, dilated_attention_weights
from trifuse.kernels.ops._dilated_windows import check_windows
from trifuse.kernels.ops.dilated_attention import packed_dilated_attention

from .memory_efficient_attention import init_linear
from .plain_layers import pointwise


class DilatedAttention(nn.Module):
    """Let every pixel attend to a k x k window around it, at several dilations: (B, H, W, C) -> (B, H, W, C).

    The output channels of the projection are ordered (q | k | v, dilation, head, channel), as in DilateFormer, whose
    weights load by name. The input is left as it is.

    Args:
        dim: number of channels C.
        num_heads: number of heads; C must be a multiple of it, and it a multiple of the number of dilations.
        kernel_size: side k of the window, odd.
        dilations: the spacing of the window's pixels for each group of heads.
        qkv_bias: whether the first projection has a bias.
        scale: factor on the logits; None means (C / num_heads) ** -0.5.
        border: what a window sees outside of the image; see `dilated_attention`.

    Raises:
        ShapeError: channels, heads, window and dilations do not fit each other.

    Source: Jiao et al., DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition, section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 3,
        dilations: Sequence[int] = (1, 2, 3),
        qkv_bias: bool = True,
        scale: float | None = None,
        border: str = "zero",
    ) -> None:
        super().__init__()
        check_windows(type(self).__name__, dim, num_heads, kernel_size, dilations, border)
        self.dim, self.num_heads, self.kernel_size, self.dilations = dim, num_heads, kernel_size, tuple(dilations)
        self.scale, self.border = scale, border
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start as DilateFormer does: the convolution as PyTorch's do, the linear layer truncated normal, bias zero."""
        nn.init.kaiming_uniform_(self.qkv.weight, a=5**0.5, generator=generator)
        if self.qkv.bias is not None:
            bound = self.qkv.in_channels**-0.5
            nn.init.uniform_(self.qkv.bias, -bound, bound, generator=generator)
        init_linear(self.proj, generator)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(packed_dilated_attention(self._project(x), **self._windows()))
        return out

    def attention_map(self, x: Tensor) -> Tensor:
        """Return each pixel's attention weights for x (B, H, W, C): (B, num_heads, H, W, kernel_size**2)."""
        q, k, _ = self._project(x).chunk(3, dim=-1)
        return dilated_attention_weights(q, k, **self._windows())

    def _project(self, x: Tensor) -> Tensor:
        """Apply the 1x1 convolution as what it is in this layout, a linear map of the channels."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(
                f"DilatedAttention: expected a map (B, H, W, {self.dim}), got {tuple(x.shape)}; "
                "bring a channels-first map to this layout with x.permute(0, 2, 3, 1)"
            )
        return pointwise(self.qkv, x)

    def _windows(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "kernel_size": self.kernel_size,
            "dilations": self.dilations,
            "scale": self.scale,
            "border": self.border,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._windows().items())
