"""What the segment FiLM gate is compared with: its equations, with the ECG as a map of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def segment_film_by_the_equations(
    features: Tensor,
    segments: Tensor,
    shared: Tensor,
    segment_scores: Tensor,
    direction: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """Fuse as the equations are written: the ECG's map by a look-up of every label, then the mixture, then FiLM."""
    dtype = features.dtype
    score_of_label = F.pad(segment_scores.to(dtype), (1, 0))  # 0 outside the wall
    score = score_of_label.gather(1, segments.flatten(1).long()).view(segments.shape)
    return _fused(features, score, shared, direction, weights, scale, shift)


def segment_film_by_masks(
    features: Tensor,
    segments: Tensor,
    shared: Tensor,
    segment_scores: Tensor,
    direction: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """Fuse with one mask per segment instead of labels: the scores' map is a product of matrices."""
    dtype = features.dtype
    labels = torch.arange(1, segment_scores.shape[1] + 1, device=segments.device)
    masks = (segments[:, None] == labels[:, None, None]).to(dtype)
    score = torch.bmm(segment_scores.to(dtype)[:, None], masks.flatten(2)).view(segments.shape)
    return _fused(features, score, shared, direction, weights, scale, shift)


def _fused(
    features: Tensor, score: Tensor, shared: Tensor, direction: Tensor, weights: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """Make the ECG's map from the score of every position, mix, and modulate."""
    dtype = features.dtype
    ecg_map = shared.to(dtype)[:, :, None, None] + score[:, None] * direction.to(dtype)[:, None, None]
    w_mri, w_ecg = weights.to(dtype)[:, :, None, None, None].unbind(1)
    mixed = features * w_mri + ecg_map * w_ecg
    return features + mixed * (1 + scale.to(dtype)[:, :, None, None]) + shift.to(dtype)[:, :, None, None]


compiled_segment_film = torch.compile(segment_film_by_the_equations, dynamic=False)
