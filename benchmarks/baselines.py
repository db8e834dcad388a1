"""What the operators are compared with: what people write without them, and the nearest public peers; no tricks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor


def stack_einsum(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Fuse N maps by stacking them and contracting: the usual way."""
    return torch.einsum("n,nbmd->bmd", torch.softmax(logits, 0).to(features[0].dtype), torch.stack(tuple(features)))


def running_sum(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Fuse N maps one after the other: no stack, but the sum is written and read N times."""
    weights = torch.softmax(logits, 0).to(features[0].dtype)
    fused = weights[0] * features[0]
    for weight, feature in zip(weights[1:], features[1:], strict=True):
        fused = fused + weight * feature
    return fused


compiled_running_sum = torch.compile(running_sum, dynamic=False)


def liger_attention_residuals(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Fuse N maps with Liger-Kernel's attention over residuals, the nearest public kernel, on the same weights.

    Its weights come from each token's own keys; with a query of zeros and the logits in a column that only it reads,
    they are the softmax of the logits.
    """
    raise NotImplementedError


LIGER_MISSING = "" if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
