"""What the operators are compared with: what people write without them, and the nearest public peers; no tricks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from unittest import mock

import torch
from torch import Tensor, nn

from trifuse.architectures.dino_unet import decoder
from trifuse.architectures.dino_unet.model import DinoUNet
from trifuse.blocks import weighted_block_fusion as fusion_block

from .dinov2 import TransformersEncoder


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
    """Fuse N maps with equal weights by Liger-Kernel's attention residuals, the nearest public Triton kernel.

    There a learned query gives every token its own weights; a query of zeros makes them equal, so that its result and
    the maps' gradients are those of weighted block fusion with equal logits. It takes the maps stacked.
    """
    from liger_kernel.ops.attn_res import LigerAttnResFunction

    width = features[0].shape[-1]
    query = torch.zeros(width, dtype=features[0].dtype, device=features[0].device)
    return LigerAttnResFunction.apply(torch.stack(tuple(features)), query, torch.ones_like(query), 1e-6)


LIGER_MISSING = "" if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


class TransformersDinoUNet(nn.Module):
    """`DinoUNet` as one would put it together: transformers gives all blocks' tokens, they are stacked and contracted.

    It shares the trained parameters of the network that it is built from; images stay in the layout that they have.
    """

    def __init__(self, network: DinoUNet, encoder: TransformersEncoder) -> None:
        super().__init__()
        self.network, self.encoder = network, encoder

    def forward(self, image: Tensor) -> Tensor:
        """Segment images (B, 3, H, W), sides multiples of 14, into logits (B, K, H, W)."""
        with torch.no_grad():
            tokens = self.encoder.model(image, output_hidden_states=True).hidden_states[1:]
            features = [self.encoder.model.layernorm(x)[:, 1:] for x in tokens]
        with (
            mock.patch.object(fusion_block, "weighted_block_fusion", stack_einsum),
            mock.patch.object(decoder, "convolution_layout", lambda x: x),
        ):
            return self.network.forward_features(features, self.network.encoder.grid_of(image), image)
