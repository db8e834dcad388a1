"""A frozen DINOv3 vision transformer that gives the patch tokens of any of its blocks.

    x_0 = [class token, registers, patches of the image];   x_i+1 = block_i(x_i);   F_i = patches of norm(x_i+1)

Positions turn the queries and keys of the patches in every block. Patches are 16 pixels wide; any grid will do.

Source: Siméoni et al., DINOv3. Its published weights are under the DINOv3 License; none are shipped here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from trifuse.blocks.memory_efficient_attention import INIT_STD
from trifuse.blocks.rotary_positions import axial_positions
from trifuse.blocks.transformer_block import TransformerBlock, iterate_blocks
from trifuse.kernels.choices import check_choice

from .dinov3_names import DinoV3Config, read_renamed
from .encoder import PatchEmbedding
from .frozen_encoder import FrozenTransformer
from .variants import DINOV3_PATCH_SIZE, DINOV3_VARIANTS, ROPE_BASE, DinoV3Shape

LAYER_NORM_EPS = 1e-5


class DinoV3Encoder(FrozenTransformer):
    """Turn images (B, 3, H, W) into the patch tokens (B, M, D) of chosen blocks; frozen for good.

    The weights never require gradients, the module stays in eval mode whatever `train` is told, and nothing is recorded
    for a backward pass. Images should be normalised with the mean and deviation that DINOv3 was trained with; they are
    converted to the type of the weights. Angles and rotations are computed in float32, or wider.

    Args:
        variant: a name from `DINOV3_VARIANTS`, or a `DinoV3Shape`.
        norm_blocks: whether the final LayerNorm is applied to every block's tokens.
        checkpoint: weights to load: a folder written by `convert_dinov3`, or a file in either published layout. None
            draws random weights.
        dtype: type of the weights, e.g. ``torch.bfloat16``; None means float32.
        num_registers: number of register tokens, 4 in all published weights; they are dropped from the features.
        generator: source of the random weights; None means PyTorch's global one.

    Raises:
        ValueError: an unknown variant.
        TypeError: ``dtype`` is no floating-point type.
        CheckpointError: see `load_checkpoint`.
    """

    def __init__(
        self,
        variant: str | DinoV3Shape = "dinov3_base",
        norm_blocks: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_registers: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(variant, DinoV3Shape):
            check_choice("DinoV3Encoder: variant", variant, DINOV3_VARIANTS)
            variant = DINOV3_VARIANTS[variant]
        self.shape, self.norm_blocks, self.num_registers = variant, norm_blocks, num_registers
        self.embed_dim, self.depth, self.patch_size = variant.embed_dim, variant.depth, DINOV3_PATCH_SIZE
        self._make(partial(self._build, variant), checkpoint, dtype, generator)

    def _build(self, shape: DinoV3Shape) -> None:
        D = shape.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        if self.num_registers:
            self.register_tokens = nn.Parameter(torch.empty(1, self.num_registers, D))
        self.patch_embed = PatchEmbedding(D, DINOV3_PATCH_SIZE)
        self.blocks = nn.ModuleList(
            [
                TransformerBlock(
                    D, shape.num_heads, shape.mlp_ratio, shape.ffn, qkv_bias=shape.qkv_bias, eps=LAYER_NORM_EPS
                )
                for _ in range(shape.depth)
            ]
        )
        self.norm = nn.LayerNorm(D, eps=LAYER_NORM_EPS)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw random weights: (truncated) normal of deviation 0.02, LayerScale 1."""
        nn.init.normal_(self.cls_token, std=INIT_STD, generator=generator)
        if self.num_registers:
            nn.init.normal_(self.register_tokens, std=INIT_STD, generator=generator)
        self.patch_embed.reset_parameters(generator)
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            block.reset_parameters(generator)
        self.norm.reset_parameters()

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Load a folder written by `convert_dinov3`, or a file in either published layout.

        Raises:
            CheckpointError: nothing is there, it is damaged or holds code, or it is another encoder than this.
        """
        state, report = read_renamed(Path(path), expected_weights)
        self._load(Path(path), state, report.config, DINOV3_VARIANTS[report.config.variant])

    def extra_repr(self) -> str:
        return f"depth={self.depth}, norm_blocks={self.norm_blocks}, frozen"

    def embed(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x.to(self.cls_token.dtype))
        first = self.cls_token.expand(x.shape[0], -1, -1)
        registers = [self.register_tokens.expand(x.shape[0], -1, -1)] if self.num_registers else []
        return torch.cat([first, *registers, patches], dim=1)

    def _streams(self, x: Tensor, stop: int) -> Iterator[tuple[int, Tensor]]:
        positions = axial_positions(self.grid_of(x), self.embed_dim // self.shape.num_heads, ROPE_BASE, x.device)
        yield from enumerate(iterate_blocks(list(self.blocks)[:stop], self.embed(x), positions))


def expected_weights(config: DinoV3Config) -> dict[str, Tensor]:
    """Return the names and shapes of an encoder's weights, without memory for them: tensors on the meta device."""
    with torch.device("meta"):
        return DinoV3Encoder(config.variant, num_registers=config.num_registers).state_dict()
