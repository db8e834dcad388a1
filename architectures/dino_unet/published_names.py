"""The names that DINOv2 weights are published under, in three layouts, and those that the encoder uses.

===================  ============================================  ===========================================
meaning              original ``.pth``, and ours                   Hugging Face: hub file / in memory since 5.0
===================  ============================================  ===========================================
query, key, value    ``blocks.i.attn.qkv`` (rows q, then k, v)     ``encoder.layer.i.attention.attention.query``,
                                                                   ... / ``encoder.layer.i.attention.q_proj``, ...
SwiGLU, widening     ``blocks.i.mlp.w12`` (rows gate, then value)  ``...mlp.weights_in`` / ``...mlp.gate_proj``,
                                                                   ``...mlp.up_proj``
everything else      one tensor each                               one tensor each
===================  ============================================  ===========================================

Names are recognised by pattern, tensor by tensor, not by the version of a library. Nothing in a file is ever executed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trifuse.architectures.storage.published_weights import WRAPPER, ConversionReport, compare, read_tensors
from trifuse.kernels import CheckpointError

from .renaming import Rule, rename
from .variants import VARIANTS

ARCHITECTURE = "dinov2"

_BLOCK = r"(?:blocks(?:\.\d+)?|encoder\.layer)\.(\d+)\."  # FSDP wraps blocks in chunks: blocks.<chunk>.<i>
_KIND = r"\.(weight|bias)"
_RULES: list[Rule] = [
    (r"(?:embeddings\.)?(cls_token|mask_token|register_tokens)", r"\1", (0, 1)),
    (r"reg_token", r"register_tokens", (0, 1)),
    (r"pos_embed|embeddings\.position_embeddings", r"pos_embed", (0, 1)),
    (rf"(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection){_KIND}", r"patch_embed.proj.\1", (0, 1)),
    (rf"(?:norm|layernorm){_KIND}", r"norm.\1", (0, 1)),
    (rf"{_BLOCK}(norm[12]){_KIND}", r"blocks.\1.\2.\3", (0, 1)),
    (rf"{_BLOCK}attn\.(qkv|proj){_KIND}", r"blocks.\1.attn.\2.\3", (0, 1)),
    (rf"{_BLOCK}attention\.(?:attention\.query|q_proj){_KIND}", r"blocks.\1.attn.qkv.\2", (0, 3)),
    (rf"{_BLOCK}attention\.(?:attention\.key|k_proj){_KIND}", r"blocks.\1.attn.qkv.\2", (1, 3)),
    (rf"{_BLOCK}attention\.(?:attention\.value|v_proj){_KIND}", r"blocks.\1.attn.qkv.\2", (2, 3)),
    (rf"{_BLOCK}attention\.(?:output\.dense|o_proj){_KIND}", r"blocks.\1.attn.proj.\2", (0, 1)),
    (rf"{_BLOCK}(?:ls|layer_scale)([12])\.(?:gamma|lambda1)", r"blocks.\1.ls\2.gamma", (0, 1)),
    (rf"{_BLOCK}mlp\.(fc[12]){_KIND}", r"blocks.\1.mlp.\2.\3", (0, 1)),
    (rf"{_BLOCK}mlp\.(?:w12|weights_in){_KIND}", r"blocks.\1.mlp.w12.\2", (0, 1)),
    (rf"{_BLOCK}mlp\.gate_proj{_KIND}", r"blocks.\1.mlp.w12.\2", (0, 2)),
    (rf"{_BLOCK}mlp\.up_proj{_KIND}", r"blocks.\1.mlp.w12.\2", (1, 2)),
    (rf"{_BLOCK}mlp\.(?:w3|weights_out|down_proj){_KIND}", r"blocks.\1.mlp.w3.\2", (0, 1)),
]
_HEADS = r"(?:head|heads|linear_head|classifier|dino_head|ibot_head)\..+"
_WRAPPERS = rf"(?:{WRAPPER}|dinov2\.|dinov2_with_registers\.)*"


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder that converted weights belong to: arguments of `DinoV2Encoder`.

    Args:
        variant: a name from `VARIANTS`.
        num_registers: number of register tokens.
        pos_mode: how the published code of this family resamples its position table.
    """

    variant: str
    num_registers: int
    pos_mode: str

    def __str__(self) -> str:
        return f"DinoV2Encoder({self.variant!r}, num_registers={self.num_registers}, pos_mode={self.pos_mode!r})"


ExpectedWeights = Callable[[EncoderConfig], Mapping[str, Tensor]]


def read_renamed(path: Path, expected: ExpectedWeights) -> tuple[dict[str, Tensor], ConversionReport]:
    """Read a converted folder or a published file, and rename its tensors; see `renamed`."""
    return renamed(read_tensors(path, ARCHITECTURE), str(path), expected)


def renamed(
    tensors: Mapping[str, Tensor], source: str, expected: ExpectedWeights
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Rename tensors of any published layout to the encoder's names, and check that they are those of one encoder.

    Args:
        tensors: a state dict in any published layout. A mask token that is missing becomes zeros: the encoder never
            uses it.
        source: where it came from, for the report.
        expected: returns the names and shapes of the weights of an encoder, e.g. on the meta device.

    Raises:
        CheckpointError: the tensors are not exactly those of one DINOv2 encoder, training heads aside.
    """
    found = rename(tensors, source, _RULES, wrappers=_WRAPPERS, without_use=_HEADS)
    state = found.joined(source)
    _from_timm(state, found.mapped)
    config = _detect(state, source)
    if "cls_token" in state:
        state.setdefault("mask_token", torch.zeros_like(state["cls_token"][0]))
    wanted = expected(config)
    return compare(
        source, config, state, wanted, mapped=found.mapped, ignored=found.ignored, unexpected=found.unexpected
    )


def _from_timm(state: dict[str, Tensor], mapped: dict[str, str]) -> None:
    """Undo in place what timm does beside renaming.

    It has a SwiGLU's matrices as fc1 and fc2, and where there are registers it has added the class token's position to
    the token itself.
    """
    widening, narrowing = (state.get(f"blocks.0.mlp.fc{part}.weight", torch.empty(0)) for part in (1, 2))
    if widening.ndim == narrowing.ndim == 2 and len(widening) == 2 * narrowing.shape[1]:
        for name in [name for name in state if ".mlp.fc" in name]:
            state[_of_swiglu(name)] = state.pop(name)
        mapped.update({published: _of_swiglu(name) for published, name in mapped.items()})
    positions = state.get("pos_embed", torch.empty(0))
    if "register_tokens" in state and positions.ndim == 3 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


def _of_swiglu(name: str) -> str:
    return name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")


def _detect(state: Mapping[str, Tensor], source: str) -> EncoderConfig:
    """Infer the encoder from names and shapes."""
    positions, cls_token = state.get("pos_embed"), state.get("cls_token")
    registers = state.get("register_tokens")
    tokens = [tensor for tensor in (positions, cls_token, registers) if tensor is not None]
    if positions is None or cls_token is None or any(tensor.dim() != 3 or tensor.shape[1] < 1 for tensor in tokens):
        raise CheckpointError(
            f"{source}: expected the weights of a DINOv2 encoder, found no class token and position table in it"
        )
    depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    ffn = "swiglu" if any(".mlp.w12." in name for name in state) else "mlp"
    found = (positions.shape[2], depth, ffn, math.isqrt(positions.shape[1] - 1))
    for variant, shape in VARIANTS.items():
        if found == (shape.embed_dim, shape.depth, shape.ffn, shape.native_grid):
            num_registers = 0 if registers is None else registers.shape[1]
            return EncoderConfig(variant, num_registers, "antialias" if num_registers else "offset")
    raise CheckpointError(
        f"{source}: tokens of width {found[0]}, {depth} blocks with {ffn} and {found[3]} x {found[3]} positions are "
        f"none of the variants {', '.join(VARIANTS)}"
    )
