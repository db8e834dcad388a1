"""DilateFormer: four stages of transformer blocks, local and dilated in the first two, global in the last two.

    x_1 = patch_embed(image), x_l+1 = merge(blocks_l(x_l));   F_l = norm_l(blocks_l(x_l)), taken before the merge

Parameter names and shapes are those of the published weights.

Source: Jiao et al., DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trifuse.architectures.storage.pretrained import load_strict
from trifuse.blocks.dilated_attention import DilatedAttention
from trifuse.blocks.memory_efficient_attention import MemoryEfficientAttention, init_linear
from trifuse.blocks.normalization import BatchNorm
from trifuse.blocks.plain_layers import NormGeluSequential, add_and_normalise, add_branch, normalise
from trifuse.blocks.transformer_block import LAYER_NORM_EPS, Mlp
from trifuse.kernels import CheckpointError, ShapeError
from trifuse.kernels.choices import check_choice

from .published_names import DilateFormerConfig, read_renamed
from .variants import DILATIONS, LOCAL_STAGES, VARIANTS, DilateFormerShape, check_dilations

REDUCTION = 32  # of the last stage; an image's sides are multiples of it
_STEM_DIMS = (16, 32, 64)
_STEM_STRIDES = (1, 2, 1, 2)


class PatchEmbedding(nn.Module):
    """Bring an image to a quarter of its size by four overlapping convolutions: (B, 3, H, W) -> (B, D, H/4, W/4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for in_dim, out_dim, stride in zip((3, *_STEM_DIMS), (*_STEM_DIMS, dim), _STEM_STRIDES, strict=True):
            layers += [nn.Conv2d(in_dim, out_dim, 3, stride, padding=1, bias=False), BatchNorm(out_dim), nn.GELU()]
        self.proj = NormGeluSequential(*layers[:-2])  # the last convolution is bare

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PatchMerging(nn.Module):
    """Halve the size and double the channels: (B, C, H, W) -> (B, 2C, H/2, W/2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1), BatchNorm(2 * dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class DilateFormerBlock(nn.Module):
    """Encode positions, attend, transform each pixel: (B, H, W, C) -> (B, H, W, C).

    ``x + pos_embed(x)``, a depthwise convolution; then ``x + drop(attn(norm1(x)))``; then ``x + drop(mlp(norm2(x)))``.

    Args:
        dim: channels C.
        num_heads: attention heads.
        dilations: of the 3 x 3 windows that the groups of heads attend to; None lets every pixel see every other.
        mlp_ratio: width of the hidden layer over C.
        drop_path: probability with which a sample skips either branch while training.

    Raises:
        ShapeError: heads that do not divide the channels, or dilations that do not divide the heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dilations: tuple[int, ...] | None = DILATIONS,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.local = dilations is not None
        self.attn: nn.Module = (
            MemoryEfficientAttention(dim, num_heads)
            if dilations is None
            else DilatedAttention(dim, num_heads, dilations=dilations)
        )
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        positions = self.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x, normalised = add_and_normalise(x, positions, self.norm1)
        branch = self._attend(normalised)
        x, normalised = add_and_normalise(x, branch, self.norm2, sample_scale=self._draw(branch))
        branch = self.mlp(normalised)
        return add_branch(x, branch, self._draw(branch))

    def _attend(self, x: Tensor) -> Tensor:
        return self.attn(x) if self.local else self.attn(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

    def _draw(self, branch: Tensor) -> Tensor | None:
        """Draw a factor of each sample, (B,): 0 for those that skip a branch, for others what keeps its mean."""
        if not self.training or self.drop_path == 0.0:
            return None
        keep = 1.0 - self.drop_path
        kept = torch.empty(branch.shape[0], dtype=branch.dtype, device=branch.device).bernoulli_(keep)
        return kept / keep


class Stage(nn.Module):
    """Some blocks, and the layer that brings their result to the size of the next stage."""

    def __init__(self, blocks: list[DilateFormerBlock], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks on (B, C, H, W); the result lies in memory as (B, H, W, C)."""
        x = x.permute(0, 2, 3, 1).contiguous()
        for block in self.blocks:
            x = block(x)
        return x


class DilateFormer(nn.Module):
    """Turn images (B, 3, H, W) into four maps (B, C_l, H/4, W/4), ..., (B, 8 C_l, H/32, W/32).

    Args:
        variant: ``"tiny"``, ``"small"``, ``"base"``, ``"nano"`` (for tests and the demo), or a `DilateFormerShape`.
        out_norm: give each of the first three maps a LayerNorm of its own, which the published network lacks; the last
            has the published ``norm`` either way.
        dilations: of the windows in the first two stages, each for an equal share of the heads; the published ones are
            1, 2 and 3. Weights have the same shapes, and load, whatever they are.
        drop_path: probability with which the last block's branches are skipped; it grows linearly from 0.
        checkpoint: weights to load: a folder written by `convert_dilateformer`, or a published file. None draws random
            weights.
        num_classes: outputs of the classifier of `classify`; 0 for none.
        generator: source of the random weights; None means PyTorch's global one.

    Raises:
        ValueError: an unknown variant, dilations that the heads cannot be shared out to, or a probability outside
            [0, 1).
        CheckpointError: see `load_checkpoint`.

    Attributes:
        dims: channels of the four maps.

    Source: Jiao et al., DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition.
    """

    def __init__(
        self,
        variant: str | DilateFormerShape = "tiny",
        *,
        out_norm: bool = True,
        dilations: Sequence[int] = DILATIONS,
        drop_path: float = 0.1,
        checkpoint: str | os.PathLike[str] | None = None,
        num_classes: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(variant, DilateFormerShape):
            check_choice("DilateFormer: variant", variant, VARIANTS)
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"DilateFormer: expected drop_path in [0, 1), got {drop_path}")
        shape = variant if isinstance(variant, DilateFormerShape) else VARIANTS[variant]
        check_dilations(shape, dilations)
        self.shape, self.dims = shape, shape.dims
        device = torch.get_default_device()
        with torch.device("meta"):  # so that no weight is drawn twice
            self.patch_embed = PatchEmbedding(shape.embed_dim)
            self.stages = nn.ModuleList(_stages(shape, tuple(dilations), drop_path))
            self.norm = nn.LayerNorm(shape.dims[-1], eps=LAYER_NORM_EPS)
            if out_norm:
                self.out_norms = nn.ModuleList([nn.LayerNorm(dim, eps=LAYER_NORM_EPS) for dim in shape.dims[:-1]])
            if num_classes:
                self.head = nn.Linear(shape.dims[-1], num_classes)
        self.to_empty(device=device)
        self.reset_parameters(generator)
        if checkpoint is not None:
            self.load_checkpoint(checkpoint)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: linear layers from a truncated normal of deviation 0.02, convolutions as PyTorch."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                init_linear(layer, generator)
            elif isinstance(layer, nn.Conv2d):
                _init_conv(layer, generator)
            elif isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
                layer.reset_parameters()

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Load a folder written by `convert_dilateformer`, or a published file; norms it does not know stay new.

        Raises:
            CheckpointError: nothing is there, it is damaged or holds code, or it is another DilateFormer than this.
        """
        state, report = read_renamed(Path(path), expected_weights)
        if VARIANTS[report.config.variant] != self.shape:
            asked = next((repr(name) for name, shape in VARIANTS.items() if shape == self.shape), str(self.shape))
            raise CheckpointError(f"{path}: holds the weights of {report.config}, but {asked} was asked for")
        own = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(("out_norms.", "head."))}
        load_strict(self, {**own, **state}, Path(path))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the four maps, finest first; each lies in memory as (B, H, W, C).

        Args:
            x: images of shape (B, 3, H, W), H and W multiples of 32.

        Raises:
            ShapeError: the shape is not that.
        """
        _check_images(x)
        maps = []
        x = self.patch_embed(x)
        norms = [*getattr(self, "out_norms", [nn.Identity()] * 3), self.norm]
        for stage, norm in zip(self.stages, norms, strict=True):
            features = stage(x)
            maps.append(normalise(norm, features).permute(0, 3, 1, 2))
            x = cast(Stage, stage).downsample(features.permute(0, 3, 1, 2))
        return maps

    def classify(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of the published classifier: a linear layer on the last map's mean."""
        return self.head(self(x)[-1].mean((2, 3)))


def dilateformer_tiny(**options: Any) -> DilateFormer:
    """Build the encoder of FIAS: 72 channels, blocks 2, 2, 6, 2; ``options`` are arguments of `DilateFormer`."""
    return DilateFormer("tiny", **options)


def dilateformer_small(**options: Any) -> DilateFormer:
    """Build the small variant: 72 channels, blocks 3, 5, 8, 3; ``options`` are arguments of `DilateFormer`."""
    return DilateFormer("small", **options)


def dilateformer_base(**options: Any) -> DilateFormer:
    """Build the base variant: 96 channels, blocks 4, 8, 10, 3; ``options`` are arguments of `DilateFormer`."""
    return DilateFormer("base", **options)


def expected_weights(config: DilateFormerConfig) -> dict[str, Tensor]:
    """Return the names and shapes of the published weights, without memory for them: tensors on the meta device."""
    with torch.device("meta"):
        return DilateFormer(config.variant, out_norm=False).state_dict()


def _stages(shape: DilateFormerShape, dilations: tuple[int, ...], drop_path: float) -> list[Stage]:
    rates = iter(torch.linspace(0.0, drop_path, sum(shape.depths), device="cpu").tolist())
    stages = []
    for stage, (dim, depth, heads) in enumerate(zip(shape.dims, shape.depths, shape.num_heads, strict=True)):
        local = dilations if stage < LOCAL_STAGES else None
        blocks = [DilateFormerBlock(dim, heads, local, drop_path=next(rates)) for _ in range(depth)]
        stages.append(Stage(blocks, PatchMerging(dim) if stage < 3 else nn.Identity()))
    return stages


def _init_conv(conv: nn.Conv2d, generator: torch.Generator | None) -> None:
    """Initialise a convolution as `torch.nn.Conv2d` does, with a generator."""
    nn.init.kaiming_uniform_(conv.weight, a=math.sqrt(5), generator=generator)
    if conv.bias is not None:
        bound = 1 / math.sqrt(conv.weight[0].numel())
        nn.init.uniform_(conv.bias, -bound, bound, generator=generator)


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != 3:
        raise ShapeError(f"DilateFormer: expected images of shape (B, 3, H, W), got {tuple(x.shape)}")
    for name, side in zip(("height", "width"), x.shape[2:], strict=True):
        if side % REDUCTION or side == 0:
            raise ShapeError(f"DilateFormer: {name} {side} is no multiple of {REDUCTION}; resize or pad the image")
