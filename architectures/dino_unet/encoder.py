"""A frozen DINOv2 vision transformer that gives the patch tokens of any of its blocks.

    x_0 = [class token, patches of the image] + positions;   x_i+1 = block_i(x_i);   F_i = norm(x_i+1) without the class

Source: Oquab et al., DINOv2: Learning Robust Visual Features without Supervision; Darcet et al., Vision Transformers
Need Registers.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.blocks.memory_efficient_attention import INIT_STD
from trifuse.blocks.transformer_block import LAYER_NORM_EPS, TransformerBlock
from trifuse.kernels.choices import check_choice

from .frozen_encoder import FrozenTransformer
from .published_names import EncoderConfig, read_renamed
from .variants import PATCH_SIZE, VARIANTS, EncoderShape

PositionMode = Literal["offset", "size", "antialias"]
TOKEN_INIT_STD = 1e-6
_OFFSET_PATCHES = 0.1


class PatchEmbedding(nn.Module):
    """Project each patch of an image to a token: (B, 3, H, W) -> (B, M, D), row by row."""

    def __init__(self, embed_dim: int, patch_size: int = PATCH_SIZE) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.trunc_normal_(self.proj.weight, std=INIT_STD, generator=generator)
        nn.init.zeros_(cast(Tensor, self.proj.bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DinoV2Encoder(FrozenTransformer):
    """Turn images (B, 3, H, W) into the patch tokens (B, M, D) of chosen blocks; frozen for good.

    The weights never require gradients, the module stays in eval mode whatever `train` is told, and nothing is recorded
    for a backward pass. Images should be normalised with the mean and deviation that DINOv2 was trained with; they are
    converted to the type of the weights.

    Args:
        variant: ``"small"``, ``"base"``, ``"large"``, ``"giant"``, ``"tiny"`` (for tests), or an `EncoderShape`.
        pos_mode: how the position table is resampled (bicubic) to the image's patch grid. ``"offset"``: by the factor
            (h + 0.1) / 37, as published for the checkpoints without registers; ``"size"``: to the exact size, as in
            transformers; ``"antialias"``: to the exact size with a low-pass filter, as published with registers.
        norm_blocks: whether the final LayerNorm is applied to every block's tokens. Without it their scale grows with
            depth.
        checkpoint: weights to load: a folder written by `convert_dinov2`, or a file in any of the published layouts.
            None draws random weights.
        dtype: type of the weights, e.g. ``torch.bfloat16``; None means float32.
        num_registers: number of register tokens of the checkpoint family; they are dropped from the features.
        generator: source of the random weights; None means PyTorch's global one.

    Raises:
        ValueError: an unknown variant or position mode.
        TypeError: ``dtype`` is no floating-point type.
        CheckpointError: see `load_checkpoint`.

    Attributes:
        embed_dim: token width D.
        depth: number of blocks N.
        patch_size: side of a patch in pixels.
    """

    def __init__(
        self,
        variant: str | EncoderShape = "giant",
        pos_mode: str = "offset",
        norm_blocks: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_registers: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        shape = _shape_of(variant)
        check_choice("DinoV2Encoder: pos_mode", pos_mode, PositionMode)
        self.shape, self.pos_mode, self.norm_blocks, self.num_registers = shape, pos_mode, norm_blocks, num_registers
        self.embed_dim, self.depth, self.patch_size = shape.embed_dim, shape.depth, PATCH_SIZE
        self._make(partial(self._build, shape), checkpoint, dtype, generator)

    def _build(self, shape: EncoderShape) -> None:
        D = shape.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + shape.native_grid**2, D))
        if self.num_registers:
            self.register_tokens = nn.Parameter(torch.empty(1, self.num_registers, D))
        self.mask_token = nn.Parameter(torch.empty(1, D))  # unused here, but part of the published state dict
        self.patch_embed = PatchEmbedding(D)
        self.blocks = nn.ModuleList([TransformerBlock(D, shape.num_heads, ffn=shape.ffn) for _ in range(shape.depth)])
        self.norm = nn.LayerNorm(D, eps=LAYER_NORM_EPS)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw random weights: truncated normal of deviation 0.02, LayerScale 1, class and register tokens nearly 0."""
        nn.init.normal_(self.cls_token, std=TOKEN_INIT_STD, generator=generator)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD, generator=generator)
        if self.num_registers:
            nn.init.normal_(self.register_tokens, std=TOKEN_INIT_STD, generator=generator)
        nn.init.zeros_(self.mask_token)
        self.patch_embed.reset_parameters(generator)
        for block in self.blocks:
            cast(TransformerBlock, block).reset_parameters(generator)
        self.norm.reset_parameters()

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Load a folder written by `convert_dinov2`, or a file in any of the published layouts.

        Raises:
            CheckpointError: nothing is there, it is damaged or holds code, or it is another encoder than this.
        """
        state, report = read_renamed(Path(path), expected_weights)
        self._load(Path(path), state, report.config, VARIANTS[report.config.variant])

    def extra_repr(self) -> str:
        return f"depth={self.depth}, pos_mode={self.pos_mode!r}, norm_blocks={self.norm_blocks}, frozen"

    def embed(self, x: Tensor) -> Tensor:
        h, w = self.grid_of(x)
        patches = self.patch_embed(x.to(self.cls_token.dtype))
        positions = self.positions((h, w))
        first = (self.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)
        registers = [self.register_tokens.expand(x.shape[0], -1, -1)] if self.num_registers else []
        return torch.cat([first, *registers, patches + positions[:, 1:]], dim=1)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position table resampled to ``grid``: (1, 1 + h * w, D), the class token's entry first, untouched.

        It is left as it is only where the number of patches is the native one and the grid is square. Resampling is
        done in float32 whatever the type of the weights, as in both published implementations.
        """
        h, w = grid
        native = self.shape.native_grid
        if h == w == native:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (native, native)).permute(0, 3, 1, 2).float()
        if self.pos_mode == "offset":
            factors = [(side + _OFFSET_PATCHES) / native for side in grid]
            table = F.interpolate(table, scale_factor=factors, mode="bicubic")
        else:
            table = F.interpolate(table, size=grid, mode="bicubic", antialias=self.pos_mode == "antialias")
        assert table.shape[2:] == (h, w), f"positions resampled to {tuple(table.shape[2:])} instead of {grid}"
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)], dim=1)


def expected_weights(config: EncoderConfig) -> dict[str, Tensor]:
    """Return the names and shapes of an encoder's weights, without memory for them: tensors on the meta device."""
    with torch.device("meta"):
        return DinoV2Encoder(config.variant, num_registers=config.num_registers).state_dict()


def _shape_of(variant: str | EncoderShape) -> EncoderShape:
    if isinstance(variant, EncoderShape):
        return variant
    check_choice("DinoV2Encoder: variant", variant, VARIANTS)
    return VARIANTS[variant]
