"""Bring published weights of the ECG autoencoder, wrapped or not, under the names that ours has.

The published network keeps a module for each lead's attention over time; here the weights of all leads are stacked.
Nothing in a file is ever executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trifuse.architectures.storage.published_weights import (
    WRAPPER,
    ConversionReport,
    compare,
    convert_weights,
    read_tensors,
)
from trifuse.kernels.errors import CheckpointError

from .ecg_autoencoder import HEADS, NUM_LEADS, EcgAutoencoder, EcgAutoencoderConfig

_WRAPPERS = f"^(?:{WRAPPER})*"
_NAMES = r"(?:encoder|decoder)\..+"
_COUNTER = "num_batches_tracked"
_ENCODER_AGAIN = "decoder.encoder."  # a decoder that refers to its encoder saves it a second time
_RENAMED = {  # within encoder.attention: a branch's part -> ours
    "time": {"time_mha.in_proj_": "in_proj.", "time_mha.": "", "time_mlp.": ""}
    | {"time_norm_1.": "norm1.", "mlp_norm_1.": "norm2."},
    "lead": {"lead_mha.in_proj_": "in_proj.", "lead_mha.": "", "lead_mlp.": ""}
    | {"norm2.": "norm1.", "lead_norm_1.": "norm2."},
}
_HEADS = {"attention_pool_1.1.": "encoder.mean_head.", "attention_pool_2.1.": "encoder.max_head."}


def convert_ecg_dual_attention(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> ConversionReport:
    """Convert a published checkpoint to a folder that `EcgAutoencoder.from_pretrained` loads.

    The network is described by the shapes; its leads are laid out as upstream's, ``lead_layout="upstream"``.

    Args:
        path: a ``.pth`` or ``.safetensors`` file.
        out: the folder to write: ``model.safetensors`` and ``config.json``.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, is not a whole ECG autoencoder, or lies in ``out``.
    """
    return convert_weights(path, out, EcgAutoencoder.architecture, read_ecg_dual_attention)


def read_ecg_dual_attention(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], ConversionReport]:
    """Read a published checkpoint and bring it under our names.

    Raises:
        CheckpointError: nothing is there, it is damaged, holds code, or is not a whole ECG autoencoder.
    """
    return rename_ecg_dual_attention(read_tensors(Path(path), EcgAutoencoder.architecture), str(path))


def rename_ecg_dual_attention(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], ConversionReport]:
    """Rename the tensors of a published state dict to our names, and stack those of the leads' attentions.

    Args:
        tensors: a state dict of the published network.
        source: where it came from, for the report.

    Raises:
        CheckpointError: the tensors are not exactly those of one ECG autoencoder.
    """
    published: dict[str, str] = {}  # without wrappers -> as it stands in the file
    ignored: list[str] = []
    unexpected: list[str] = []
    for name, tensor in tensors.items():
        bare = re.sub(_WRAPPERS, "", name)
        if not re.fullmatch(_NAMES, bare):
            unexpected.append(name)
        elif bare in published:
            raise CheckpointError(f"{source}: {name!r} is {bare!r} a second time; it mixes two networks")
        elif not tensor.is_floating_point() and not bare.endswith(_COUNTER):
            raise CheckpointError(f"{source}: expected {name!r} of a floating-point type, got {tensor.dtype}")
        else:
            published[bare] = name
    for bare in [name for name in published if name.startswith(_ENCODER_AGAIN)]:
        original = published.get(bare.removeprefix("decoder."))
        again = published.pop(bare)
        same = original is not None and torch.equal(tensors[original], tensors[again])
        (ignored if same else unexpected).append(again)
    state, mapped = _renamed({bare: tensors[name] for bare, name in published.items()}, published)
    config = _detect(state, source)
    with torch.device("meta"):  # names and shapes without memory for the weights
        wanted = EcgAutoencoder(config).state_dict()
    strangers = [name for name, ours in mapped.items() if ours not in wanted]
    return compare(source, config, state, wanted, mapped=mapped, ignored=ignored, unexpected=[*unexpected, *strangers])


def _renamed(tensors: Mapping[str, Tensor], published: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by our names, and which of our names each published one went to."""
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    mapped: dict[str, str] = {}
    for name, tensor in tensors.items():
        ours, lead = _our_name(name)
        mapped[published[name]] = ours
        if lead is None:
            state[ours] = tensor
        else:
            parts.setdefault(ours, {})[lead] = tensor
    for ours, leads in parts.items():
        count = NUM_LEADS if ".temporal." in ours else 1
        alike = len({tensor.shape for tensor in leads.values()}) == 1
        if sorted(leads) == list(range(count)) and alike:  # else it is missing
            state[ours] = torch.stack([leads[lead] for lead in range(count)])
    return state, mapped


def _our_name(name: str) -> tuple[str, int | None]:
    """Return our name for a published one, and the place in the stack of leads of what is stacked."""
    match = re.fullmatch(r"encoder\.attention\.(.+)", name)
    if not match:
        return name, None
    part = match[1]
    for head, ours in _HEADS.items():
        if part.startswith(head):
            return ours + part.removeprefix(head), None
    lead = re.fullmatch(r"(time_\w+|mlp_norm_1)\.(\d+)\.(.+)", part)
    branch, place, part = ("time", int(lead[2]), f"{lead[1]}.{lead[3]}") if lead else ("lead", 0, part)
    for prefix, ours in _RENAMED[branch].items():
        if part.startswith(prefix):
            block = "temporal" if lead else "lead"
            return f"encoder.attention.{block}.{ours}{part.removeprefix(prefix)}", place
    return name, None


def _detect(state: Mapping[str, Tensor], source: str) -> EcgAutoencoderConfig:
    """Infer the autoencoder from names and shapes."""
    stem, first, head = (
        state.get(f"{name}.weight") for name in ("encoder.input_conv.0", "decoder.linear.0", "encoder.mean_head")
    )
    blocks = {match[1] for name in state if (match := re.match(r"encoder\.encoder\.(\d+)\.", name))}
    if stem is None or first is None or head is None or first.dim() != 2 or not blocks:
        raise CheckpointError(
            f"{source}: expected the weights of an ECG autoencoder with two attentions, found no input convolution, "
            "blocks over time, pooling and linear decoder in it"
        )
    base_dim, z_dim, pooled = stem.shape[0] // NUM_LEADS, first.shape[1], 2 * head.shape[0]
    final_linear = "encoder.linear.weight" in state
    try:
        return EcgAutoencoderConfig(
            time_steps=first.shape[0] // base_dim * 2 ** len(blocks),
            z_dim=z_dim if final_linear else pooled,
            base_dim=base_dim,
            downsample=len(blocks),
            lead_layout="upstream",
            final_linear=final_linear,
            pooled_dim=pooled if final_linear and pooled != z_dim else None,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{source}: its shapes are those of no ECG autoencoder of {NUM_LEADS} leads and {HEADS} heads ({error})"
        ) from error
