"""Masks of a heart's segments, brought to the size of a map: one label for each position."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels import ShapeError

LEAST_SHARE = 0.25  # of a position that segments must cover for it to belong to one


def pooled_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the share of each segment at each position of a smaller map: (B, S, H, W) -> (B, S, h, w).

    Args:
        masks: of S segments, 1 inside and 0 outside, of any type.
        size: h and w.

    Raises:
        ShapeError: there is no axis of segments.
    """
    if masks.ndim != 4:
        raise ShapeError(f"pooled_masks: masks has shape {tuple(masks.shape)}; expected (B, S, H, W), a mask a segment")
    wide = masks if masks.is_floating_point() else masks.float()
    return wide if wide.shape[2:] == size else F.adaptive_avg_pool2d(wide, size)


def segment_labels(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the segment of each position of a smaller map: (B, S, H, W) -> uint8 (B, h, w), 0 where there is none.

    A position belongs to the segment that covers most of it, where all segments together cover a quarter of it or
    more. A wall is as thin as such a position is wide: counted as one more segment, what lies beside the wall would
    take positions from it that hold a third of its pixels at a stage of eight by eight pixels, here it takes a tenth.

    Args:
        masks: of S segments, at most 255, 1 inside and 0 outside, of any type.
        size: h and w.

    Raises:
        ShapeError: there is no axis of segments.
    """
    shares = pooled_masks(masks, size)
    covered = shares.sum(dim=1) >= LEAST_SHARE
    return torch.where(covered, shares.argmax(dim=1) + 1, 0).to(torch.uint8)
