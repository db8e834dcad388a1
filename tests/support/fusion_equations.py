"""Temporal-aware fusion by its equations, position by position, and small blocks and arguments to compare it with."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from trifuse.blocks import TemporalAwareFusion

SEGMENTS = 5  # of a heart that is quickly tested
FIRST_FORM: dict[str, Any] = {
    "projection": "broadcast",
    "normalise_code": False,
    "gate_slope": 0.0,
    "gate_time": "unseen",
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"time": False, "rectify": True},
    {"gate_time": "joined", "projection": "segments_full"},
    {"projection": "grid", "grid_side": 2},
    {"projection": "grid", "grid_side": 3, "time": False},
    {"projection": "broadcast", "max_days": 30.0, "rectify": True},
    FIRST_FORM,
]


def random_block(dim=4, ecg_dim=6, dtype=torch.float64, **options):
    block = TemporalAwareFusion(dim, ecg_dim, num_segments=SEGMENTS, **options).to(dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(block.parameters()):
            generator = torch.Generator().manual_seed(seed)
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return block


def random_arguments(batch=3, dim=4, ecg_dim=6, size=(5, 3), dtype=torch.float64):
    """Return maps, codes and days, for samples that all have an ECG."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, dim, *size, generator=generator, dtype=dtype).requires_grad_()
    code = torch.randn(batch, ecg_dim, generator=generator, dtype=dtype).requires_grad_()
    return features, code, 100 * torch.rand(batch, generator=generator, dtype=dtype)


def labels_of(features):
    """Return labels of the size of maps, with every segment and what is outside of them, others in each sample."""
    batch, _, height, width = features.shape
    numbers = torch.arange(batch * height * width).view(batch, height, width)
    return (numbers % (SEGMENTS + 1)).to(torch.uint8)


def run(block, features, code, days=None, has_ecg=None, **further):
    """Call a block with the segments that it may need."""
    return block(features, code, days, has_ecg, labels_of(features), **further)


def ecg_map_by_the_equations(block, z, features, labels):
    """The ECG's share, a whole map: position by position for projections by segment."""
    p = F.linear(z, block.projection.weight, block.projection.bias)
    if block.form == "broadcast":
        return p[:, :, None, None].expand_as(features)
    if block.form == "grid":
        grid = p.view(len(p), block.dim, block.grid_side, block.grid_side)
        return F.interpolate(grid, features.shape[2:], mode="bilinear", align_corners=False)
    places = [(b, y, x) for b in range(len(z)) for y in range(features.shape[2]) for x in range(features.shape[3])]
    vectors = []
    for b, y, x in places:
        segment = int(labels[b, y, x])
        if block.form == "segments_full":
            vectors.append(
                p[b].view(SEGMENTS, block.dim)[segment - 1] if segment else torch.zeros_like(features[0, :, 0, 0])
            )
        else:
            scores = F.linear(z[b], block.scores.weight, block.scores.bias)
            vectors.append(p[b] + (scores[segment - 1] * block.direction if segment else 0))
    return torch.stack(vectors).view(len(z), *features.shape[2:], block.dim).permute(0, 3, 1, 2)


def _mlp(mlp, x, slope):
    hidden = F.linear(x, mlp.first.weight, mlp.first.bias)
    return F.linear(torch.where(hidden > 0, hidden, slope * hidden), mlp.second.weight, mlp.second.bias)


def by_the_equations(block, features, code, days, labels=None, image_means=None):
    """The block's equations for samples that all have an ECG, step by step; the ECG's share is a whole map."""
    z = code
    if block.normalise_code:
        centred = code - code.mean(1, keepdim=True)
        z = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    ecg_map = ecg_map_by_the_equations(block, z, features, labels_of(features) if labels is None else labels)
    means = F.adaptive_avg_pool2d(features, 1).flatten(1) if image_means is None else image_means
    seen = [means, z]
    gamma = beta = torch.zeros(*features.shape[:2], dtype=features.dtype)
    if block.film is not None:
        t = (days[:, None] / block.film.max_days).clamp(0, 1)
        gamma, beta = _mlp(block.film.mlp, t, 0).chunk(2, dim=1)
        seen += [t] if block.gate_time == "joined" else []
    slope = 0.01 if block.normalise_code else 0
    if block.gate_time == "apart":
        logits = _mlp(block.gate.others, torch.cat(seen, 1), slope) + _mlp(block.gate.time, t, slope)
    else:
        logits = _mlp(block.gate, torch.cat(seen, 1), slope)
    weights = logits.softmax(1)
    w_mri, w_ecg = weights[:, :, None, None, None].unbind(1)
    mixed = features * w_mri + ecg_map * w_ecg
    fused = features + mixed * (1 + gamma[..., None, None]) + beta[..., None, None]
    return torch.where(fused > 0, fused, 0.01 * fused) if block.rectify else fused, weights


def gradients(outputs, leaves, seed=1):
    """Return the gradients of a random weighing of the outputs, as copies."""
    generator = torch.Generator().manual_seed(seed)
    total = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
    return [grad.clone() for grad in torch.autograd.grad(total, leaves, materialize_grads=True)]
