"""The published sizes of DINOv2 and of DINOv3, and one of each small enough for tests."""

from __future__ import annotations

from dataclasses import dataclass

PATCH_SIZE = 14
DINOV3_PATCH_SIZE = 16
ROPE_BASE = 100.0  # of the frequencies of DINOv3's rotary positions


@dataclass(frozen=True)
class EncoderShape:
    """What fixes the shapes of an encoder's weights, up to the number of registers.

    Args:
        embed_dim: token width D.
        depth: number of blocks N.
        num_heads: number of attention heads.
        ffn: ``"mlp"`` or ``"swiglu"``.
        native_grid: patches per side of the images that the position table was learned on.
    """

    embed_dim: int
    depth: int
    num_heads: int
    ffn: str = "mlp"
    native_grid: int = 37


VARIANTS = {
    "tiny": EncoderShape(embed_dim=64, depth=4, num_heads=2, native_grid=16),
    "small": EncoderShape(embed_dim=384, depth=12, num_heads=6),
    "base": EncoderShape(embed_dim=768, depth=12, num_heads=12),
    "large": EncoderShape(embed_dim=1024, depth=24, num_heads=16),
    "giant": EncoderShape(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"),
}


@dataclass(frozen=True)
class DinoV3Shape:
    """What fixes the shapes of a DINOv3 encoder's weights, up to the number of registers.

    Args:
        embed_dim: token width D.
        depth: number of blocks N.
        num_heads: number of attention heads; D / heads is a multiple of 4.
        ffn: ``"mlp"``, or ``"swiglu"``, a gated one.
        mlp_ratio: width of the MLP's hidden layer over D; a gated one has two thirds of that.
        qkv_bias: whether queries and values have a bias; keys have none, which is a bias of zeros here.
    """

    embed_dim: int
    depth: int
    num_heads: int
    ffn: str = "mlp"
    mlp_ratio: float = 4.0
    qkv_bias: bool = True


DINOV3_VARIANTS = {
    "dinov3_tiny": DinoV3Shape(embed_dim=48, depth=4, num_heads=2),
    "dinov3_small": DinoV3Shape(embed_dim=384, depth=12, num_heads=6),
    "dinov3_small_plus": DinoV3Shape(embed_dim=384, depth=12, num_heads=6, ffn="swiglu", mlp_ratio=6.0),
    "dinov3_base": DinoV3Shape(embed_dim=768, depth=12, num_heads=12),
    "dinov3_large": DinoV3Shape(embed_dim=1024, depth=24, num_heads=16),
    "dinov3_huge_plus": DinoV3Shape(embed_dim=1280, depth=32, num_heads=20, ffn="swiglu", mlp_ratio=6.0),
    "dinov3_7b": DinoV3Shape(embed_dim=4096, depth=40, num_heads=32, ffn="swiglu", mlp_ratio=3.0, qkv_bias=False),
}
