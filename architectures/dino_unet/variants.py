"""The published sizes of DINOv2, and one small enough for tests."""

from __future__ import annotations

from dataclasses import dataclass

PATCH_SIZE = 14


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
