"""The published sizes of DilateFormer, and one small enough for tests and the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DILATIONS = (1, 2, 3)  # of the published networks
LOCAL_STAGES = 2  # the first ones, whose attention is dilated


@dataclass(frozen=True)
class DilateFormerShape:
    """What fixes the shapes of a DilateFormer's weights. Channels double from stage to stage.

    Args:
        embed_dim: channels of the first stage.
        depths: blocks of each of the four stages.
        num_heads: attention heads of each stage.

    Raises:
        ValueError: not four stages, or heads that do not divide the channels.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...] = (3, 6, 12, 24)

    def __post_init__(self) -> None:
        if len(self.depths) != 4 or len(self.num_heads) != 4 or min(*self.depths, *self.num_heads, self.embed_dim) < 1:
            raise ValueError(
                "a DilateFormer has four stages of at least one block, one head and one channel each, got depths "
                f"{self.depths}, num_heads {self.num_heads} and embed_dim {self.embed_dim}"
            )
        for stage, (dim, heads) in enumerate(zip(self.dims, self.num_heads, strict=True)):
            if dim % heads:
                raise ValueError(f"stage {stage + 1}: {dim} channels are no multiple of {heads} heads")

    @property
    def dims(self) -> tuple[int, ...]:
        """The channels of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(4))


VARIANTS = {
    "nano": DilateFormerShape(embed_dim=24, depths=(1, 1, 2, 1)),
    "tiny": DilateFormerShape(embed_dim=72, depths=(2, 2, 6, 2)),
    "small": DilateFormerShape(embed_dim=72, depths=(3, 5, 8, 3)),
    "base": DilateFormerShape(embed_dim=96, depths=(4, 8, 10, 3)),
}


def check_dilations(shape: DilateFormerShape, dilations: Sequence[int]) -> None:
    """Refuse dilations that the heads of the first two stages cannot be shared out to.

    Raises:
        ValueError: no dilation, one below 1, or a number of them that does not divide the heads.
    """
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations must be whole numbers of at least 1, at least one, got {tuple(dilations)}")
    for stage, heads in enumerate(shape.num_heads[:LOCAL_STAGES], start=1):
        if heads % len(dilations):
            raise ValueError(
                f"stage {stage}: {heads} heads are no multiple of the {len(dilations)} dilations {tuple(dilations)}; "
                "each dilation has as many heads as the others"
            )
