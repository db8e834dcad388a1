"""Labels from coarse logits: upsample, add up, take the class of the largest, without the full-resolution logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

OP = "upsample_argmax"


def upsample_argmax_reference(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Define `upsample_argmax`: upsample each map, add up, take the first largest class."""
    kept = torch.promote_types(logits[0].dtype, torch.float32)
    upsampled = [F.interpolate(m.to(kept), size, mode="bilinear", align_corners=False) for m in logits]
    return torch.stack(upsampled).sum(dim=0).argmax(dim=1).to(torch.uint8)


def upsample_argmax(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Upsample coarse logits, add them up, and return the class of the largest."""
    with torch.no_grad():
        return upsample_argmax_reference(logits, size)
