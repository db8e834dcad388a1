"""The names that DINOv3 weights are published under, in two layouts, and those that the encoder uses.

===================  =============================================  =========================================
meaning              original ``.pth``                              Hugging Face: hub file / in memory
===================  =============================================  =========================================
blocks               ``blocks.i.``                                  ``layer.i.`` / ``model.layer.i.``
registers            ``storage_tokens``                             ``embeddings.register_tokens``
query, key, value    ``attn.qkv`` (rows q, then k, v); the keys'    ``attention.q_proj``, ``k_proj`` (without a
                     bias is masked by ``attn.qkv.bias_mask``       bias), ``v_proj``
MLP                  ``mlp.fc1``, ``mlp.fc2``                       ``mlp.up_proj``, ``mlp.down_proj``
gated MLP            ``mlp.w1`` (gate), ``mlp.w2``, ``mlp.w3``      ``mlp.gate_proj``, ``up_proj``, ``down_proj``
===================  =============================================  =========================================

Left out, because no patch token passes through them: the mask token, and the norms that some sizes keep for the class
token alone (``cls_norm``, ``local_cls_norm``). The periods of the rotary positions are not learned; they are compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from trifuse.architectures.storage.published_weights import WRAPPER, ConversionReport, compare, read_tensors
from trifuse.kernels import CheckpointError

from .renaming import Renamed, Rule, rename
from .variants import DINOV3_VARIANTS, ROPE_BASE

ARCHITECTURE = "dinov3"
LICENCE = (
    "the weights are under the DINOv3 License, https://ai.meta.com/resources/models-and-libraries/dinov3-license: "
    "agree to it before you use them, and pass it on with whatever contains them"
)
_BLOCK = r"(?:blocks(?:\.\d+)?|layer)\.(\d+)\."  # FSDP wraps blocks in chunks: blocks.<chunk>.<i>
_KIND = r"\.(weight|bias)"
_SHARED: list[Rule] = [
    (r"(?:embeddings\.)?cls_token", r"cls_token", (0, 1)),
    (r"storage_tokens|(?:embeddings\.)?register_tokens", r"register_tokens", (0, 1)),
    (rf"(?:patch_embed\.proj|embeddings\.patch_embeddings){_KIND}", r"patch_embed.proj.\1", (0, 1)),
    (rf"norm{_KIND}", r"norm.\1", (0, 1)),
    (rf"{_BLOCK}(norm[12]){_KIND}", r"blocks.\1.\2.\3", (0, 1)),
    (rf"{_BLOCK}attn\.(qkv|proj){_KIND}", r"blocks.\1.attn.\2.\3", (0, 1)),
    (rf"{_BLOCK}attention\.q_proj{_KIND}", r"blocks.\1.attn.qkv.\2", (0, 3)),
    (rf"{_BLOCK}attention\.k_proj{_KIND}", r"blocks.\1.attn.qkv.\2", (1, 3)),
    (rf"{_BLOCK}attention\.v_proj{_KIND}", r"blocks.\1.attn.qkv.\2", (2, 3)),
    (rf"{_BLOCK}attention\.o_proj{_KIND}", r"blocks.\1.attn.proj.\2", (0, 1)),
    (rf"{_BLOCK}(?:ls|layer_scale)([12])\.(?:gamma|lambda1)", r"blocks.\1.ls\2.gamma", (0, 1)),
]
_PLAIN: list[Rule] = [
    (rf"{_BLOCK}mlp\.(?:fc1|up_proj){_KIND}", r"blocks.\1.mlp.fc1.\2", (0, 1)),
    (rf"{_BLOCK}mlp\.(?:fc2|down_proj){_KIND}", r"blocks.\1.mlp.fc2.\2", (0, 1)),
]
_GATED: list[Rule] = [
    (rf"{_BLOCK}mlp\.(?:w1|gate_proj){_KIND}", r"blocks.\1.mlp.w12.\2", (0, 2)),
    (rf"{_BLOCK}mlp\.(?:w2|up_proj){_KIND}", r"blocks.\1.mlp.w12.\2", (1, 2)),
    (rf"{_BLOCK}mlp\.(?:w3|down_proj){_KIND}", r"blocks.\1.mlp.w3.\2", (0, 1)),
    (rf"{_BLOCK}mlp\.w12{_KIND}", r"blocks.\1.mlp.w12.\2", (0, 1)),  # as this library writes it
]
_IS_GATED = re.compile(r"\.mlp\.(?:w1|w12|gate_proj)\.")
_PERIODS = r"rope_embed\.periods"
_MASK = "bias_mask"
_CLASS_NORMS = r"(?:local_)?cls_norm\..+"
_WITHOUT_USE = (
    rf"(?:embeddings\.)?mask_token|{_CLASS_NORMS}|{_PERIODS}|{_BLOCK}attn\.qkv\.{_MASK}|"
    r"(?:head|heads|classifier|dino_head|ibot_head)\..+"
)
_WRAPPERS = rf"(?:{WRAPPER}|dinov3\.|dinov3_vit\.)*"
_PERIODS_DIFFER = 0.01  # by more than bfloat16 rounds


@dataclass(frozen=True)
class DinoV3Config:
    """The encoder that converted weights belong to: arguments of `DinoV3Encoder`.

    Args:
        variant: a name from `DINOV3_VARIANTS`.
        num_registers: number of register tokens.
    """

    variant: str
    num_registers: int

    def __str__(self) -> str:
        return f"DinoV3Encoder({self.variant!r}, num_registers={self.num_registers})"


ExpectedWeights = Callable[[DinoV3Config], Mapping[str, Tensor]]


def read_renamed(path: Path, expected: ExpectedWeights) -> tuple[dict[str, Tensor], ConversionReport]:
    """Read a converted folder or a published file, and rename its tensors; see `renamed`."""
    return renamed(read_tensors(path, ARCHITECTURE), str(path), expected)


def renamed(
    tensors: Mapping[str, Tensor], source: str, expected: ExpectedWeights
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Rename tensors of either published layout to the encoder's names, and check that they are those of one encoder.

    Args:
        tensors: a state dict in either layout.
        source: where it came from, for the report.
        expected: returns the names and shapes of the weights of an encoder, e.g. on the meta device.

    Raises:
        CheckpointError: the tensors are not exactly those of one DINOv3 encoder, training heads and what no patch token
            passes through aside; or its positions turn with other periods.
    """
    rules = [*_SHARED, *(_GATED if any(map(_IS_GATED.search, tensors)) else _PLAIN)]
    found = rename(tensors, source, rules, wrappers=_WRAPPERS, without_use=_WITHOUT_USE)
    _keys_without_bias(found, tensors)
    state = found.joined(source)
    config = _detect(state, source)
    _check_periods(tensors, config, source)
    state, report = compare(
        source,
        config,
        state,
        expected(config),
        mapped=found.mapped,
        ignored=found.ignored,
        unexpected=found.unexpected,
    )
    notes = [LICENCE]
    if any(re.fullmatch(_WRAPPERS + _CLASS_NORMS, name) for name in found.ignored):
        notes.append("the class token has a norm of its own, which no patch token passes through: left out")
    return state, replace(report, further={"licence": LICENCE}, notes=tuple(notes))


def _keys_without_bias(found: Renamed, tensors: Mapping[str, Tensor]) -> None:
    """Give keys a bias of zeros in place: they have none, or one that a mask takes away."""
    for published, ours in found.mapped.items():
        parts = found.parts[ours]
        if published.endswith("q_proj.bias") and 2 in parts:
            parts.setdefault(1, torch.zeros_like(parts[0]))
        mask = tensors.get(f"{published.removesuffix('bias')}{_MASK}") if published.endswith("qkv.bias") else None
        if mask is not None and mask.shape == parts[0].shape:
            parts[0] = torch.where(mask == 0, torch.zeros_like(parts[0]), parts[0])


def _check_periods(tensors: Mapping[str, Tensor], config: DinoV3Config, source: str) -> None:
    for name, periods in tensors.items():
        if not re.fullmatch(_WRAPPERS + _PERIODS, name):
            continue
        shape = DINOV3_VARIANTS[config.variant]
        width = shape.embed_dim // shape.num_heads
        ours = ROPE_BASE ** torch.arange(0, 1, 4 / width)
        if periods.shape != ours.shape or not torch.allclose(periods.float().cpu(), ours, rtol=_PERIODS_DIFFER):
            raise CheckpointError(
                f"{source}: expected rotary positions with periods from 1 to {float(ours[-1]):.4g}, got other ones "
                f"in {name!r}: features of these weights would be wrong; use the published weights"
            )


def _detect(state: Mapping[str, Tensor], source: str) -> DinoV3Config:
    """Infer the encoder from names and shapes."""
    cls_token, registers = state.get("cls_token"), state.get("register_tokens")
    tokens = [tensor for tensor in (cls_token, registers) if tensor is not None]
    if cls_token is None or "pos_embed" in state or any(tensor.dim() != 3 for tensor in tokens):
        raise CheckpointError(f"{source}: expected the weights of a DINOv3 encoder, found no class token in it")
    depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    ffn = "swiglu" if any(".mlp.w12." in name for name in state) else "mlp"
    found = (cls_token.shape[2], depth, ffn)
    for variant, shape in DINOV3_VARIANTS.items():
        if found == (shape.embed_dim, shape.depth, shape.ffn):
            return DinoV3Config(variant, 0 if registers is None else registers.shape[1])
    raise CheckpointError(
        f"{source}: tokens of width {found[0]} and {depth} blocks with {ffn} are none of the variants "
        f"{', '.join(DINOV3_VARIANTS)}"
    )
