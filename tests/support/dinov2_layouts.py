"""The layouts in which DINOv2 weights are published, made from the encoder's own names."""

from __future__ import annotations

import re

import torch

from trifuse.architectures.dino_unet.encoder import DinoV2Encoder

# The renaming that transformers applies to hub files when it loads them, backwards.
HUB_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}


def random_state(variant="tiny", num_registers=0):
    """Numbers for every tensor, the mask token too, so that no two parts of the network could be exchanged unseen."""
    state = DinoV2Encoder(variant, num_registers=num_registers).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def in_chunks(state):
    """The original layout as FSDP training leaves it: blocks.<chunk>.<i>, two blocks to a chunk."""
    return {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", key): t for key, t in state.items()}


def in_memory(state):
    """The names of transformers' Dinov2Model, by the mapping that stands in the golden data."""
    renamed = {}
    for name, tensor in state.items():
        new = name.replace("blocks.", "encoder.layer.")
        for ours, theirs in (
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("attn.proj", "attention.o_proj"),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
            ("mlp.w3", "mlp.down_proj"),
            ("pos_embed", "embeddings.position_embeddings"),
        ):
            new = new.replace(ours, theirs)
        new = re.sub(r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1", new)
        new = re.sub(r"^norm\.", "layernorm.", new)
        split = {"attn.qkv": ("q_proj", "k_proj", "v_proj"), "mlp.w12": ("gate_proj", "up_proj")}
        for fused, names in split.items():
            if fused in new:
                folder = "attention" if fused == "attn.qkv" else "mlp"
                for part, theirs in zip(tensor.chunk(len(names)), names, strict=True):
                    renamed[new.replace(fused, f"{folder}.{theirs}")] = part.clone()
                break
        else:
            renamed[new] = tensor
    return renamed


def in_hub_file(state):
    renamed = {}
    for name, tensor in in_memory(state).items():
        for ours, theirs in HUB_NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    for name in [name for name in renamed if "mlp.gate_proj" in name]:
        parts = [renamed.pop(name), renamed.pop(name.replace("gate_proj", "up_proj"))]
        renamed[name.replace("gate_proj", "weights_in")] = torch.cat(parts)
    return renamed


LAYOUTS = {"original": dict, "chunked": in_chunks, "hub file": in_hub_file, "in memory": in_memory}
