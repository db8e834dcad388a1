"""TAFF-UNet and the plain U-Net as one would put them together: the same parameters, none of our operators.

The fusion is its equations, step by step, on a whole map made of the ECG's code; the loss is softmax, Dice and
cross-entropy written out at each resolution.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.blocks import TemporalAwareFusion
from trifuse.blocks.normalization import InstanceNorm

DICE_SMOOTHING = 1e-5  # nnU-Net's


class SpreadFusion(nn.Module):
    """Temporal-aware fusion per segment as written: normalise, project, spread, mix, modulate, add; all have an ECG."""

    def __init__(self, block: TemporalAwareFusion) -> None:
        super().__init__()
        assert (block.form, block.gate_time) == ("segments", "apart"), "written for rank one, and time in the gate"
        self.projection, self.gate, self.film = block.projection, block.gate, block.film
        self.scores, self.direction = block.scores, block.direction

    def forward(
        self,
        features: Tensor,
        code: Tensor,
        interval: Tensor,
        has_ecg: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        image_means: Tensor,
        transform: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert has_ecg is None, "written for batches in which everybody has an ECG"
        code = F.layer_norm(code, code.shape[1:])
        t = (interval / self.film.max_days).clamp(0, 1).view(-1, 1)
        weights = torch.softmax(self.gate.others(torch.cat([image_means, code], dim=1)) + self.gate.time(t), dim=1)
        w_mri, w_ecg = weights[:, :, None, None, None].unbind(1)
        gamma, beta = self.film.mlp(t).chunk(2, dim=1)
        scores = self.scores(code)
        masks = F.one_hot(segments.long(), scores.shape[1] + 1).permute(0, 3, 1, 2)[:, 1:].to(scores.dtype)
        field = (masks * scores[:, :, None, None]).sum(1, keepdim=True)
        spread = self.projection(code)[:, :, None, None] + field * self.direction[:, None, None]
        mixed = features * w_mri + spread * w_ecg
        modulated = mixed * (1 + gamma[:, :, None, None]) + beta[:, :, None, None]
        return features + modulated, weights


class PlainInstanceNorm(nn.Module):
    """Instance normalisation by PyTorch's own function."""

    def __init__(self, block: InstanceNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = block.weight, block.bias, block.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


class AsWritten(nn.Module):
    """A network on the same parameters and buffers, in which every fused part is computed as it is written."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        shared = itertools.chain(network.parameters(), network.buffers())
        self.network = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
        for parent in list(self.network.modules()):
            for name, child in list(parent.named_children()):
                for fused, form in _FORMS.items():
                    if isinstance(child, fused):
                        setattr(parent, name, form(child))

    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs)


_FORMS = {TemporalAwareFusion: SpreadFusion, InstanceNorm: PlainInstanceNorm}


def loss_as_written(outputs: Sequence[Tensor], target: Tensor) -> Tensor:
    """Return nnU-Net's loss: at each resolution but the last, halved in weight, cross-entropy minus foreground Dice."""
    shares = [0.5**index for index in range(len(outputs) - 1)]
    total = torch.zeros((), device=target.device)
    for share, logits in zip(shares, outputs[:-1], strict=True):
        labels = F.interpolate(target[:, None].float(), logits.shape[2:], mode="nearest")[:, 0].long()
        total = total + share / sum(shares) * (F.cross_entropy(logits, labels) - soft_dice(logits, labels))
    return total


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean Dice of the foreground's probabilities, pooled over the batch."""
    probabilities = torch.softmax(logits, dim=1)
    one_hot = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2).to(probabilities)
    axes = (0, 2, 3)
    intersection = (probabilities * one_hot).sum(axes)[1:]
    sizes = (probabilities.sum(axes) + one_hot.sum(axes))[1:]
    return ((2 * intersection + DICE_SMOOTHING) / (sizes + DICE_SMOOTHING).clamp_min(1e-8)).mean()
