"""DINO U-Net as one would put it together from transformers' encoder: the same parameters, none of our operators."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn

from trifuse.architectures.dino_unet import decoder
from trifuse.architectures.dino_unet.model import DinoUNet
from trifuse.blocks import weighted_block_fusion as fusion_block

from .dinov2 import TransformersEncoder
from .weighted_block_fusion import stack_einsum


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
            mock.patch.object(decoder, "channels_last", lambda x: x),
        ):
            return self.network.forward_features(features, self.network.encoder.grid_of(image), image)
