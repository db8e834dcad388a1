"""The DINOv2 that most people run: transformers' ``Dinov2Model`` under the same weights, with either attention."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from trifuse.architectures.dino_unet.convert import rename_dinov2
from trifuse.architectures.dino_unet.encoder import DinoV2Encoder
from trifuse.architectures.dino_unet.variants import PATCH_SIZE, VARIANTS


class TransformersEncoder(nn.Module):
    """Images (B, 3, H, W) -> patch tokens of the last block, normed, (B, M, D): `DinoV2Encoder`'s last feature map."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        shape = VARIANTS[variant]
        config = Dinov2Config(
            hidden_size=shape.embed_dim,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.num_heads,
            image_size=PATCH_SIZE * shape.native_grid,
            patch_size=PATCH_SIZE,
            use_swiglu_ffn=shape.ffn == "swiglu",
            attn_implementation="sdpa",
        )
        self.model = Dinov2Model(config).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).last_hidden_state[:, 1:]


def with_eager_attention(encoder: TransformersEncoder) -> TransformersEncoder:
    """Return an encoder on the same parameters that writes its score matrices out."""
    eager = copy.deepcopy(encoder, {id(tensor): tensor for tensor in encoder.parameters()})
    eager.model.set_attn_implementation("eager")
    return eager


def encoder_pair(variant: str) -> tuple[DinoV2Encoder, TransformersEncoder]:
    """Return ours and theirs with the same random weights and the same way to resample positions."""
    theirs = TransformersEncoder(variant)
    ours = DinoV2Encoder(variant, pos_mode="size")
    ours.load_state_dict(rename_dinov2(theirs.model.state_dict(), "transformers' Dinov2Model")[0])
    return ours, theirs
