"""Bring the weights of nnU-Net v2's plain 2D U-Net into a folder that `PlainUNet` loads.

Its checkpoints hold every convolution and norm of the encoder four times, and those of the decoder twice: a second time
inside each block, and once more below the decoder. Nothing in a file is ever executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trifuse.architectures.data.samples.preprocessing import Patches
from trifuse.architectures.runs.nnunet_recipe import nnunet_data
from trifuse.architectures.storage.config_json import config_to_json
from trifuse.architectures.storage.published_weights import (
    WRAPPER,
    ConversionReport,
    compare,
    convert_weights,
    read_pickled,
    read_tensors,
    tensors_in,
)
from trifuse.architectures.storage.text import listed
from trifuse.kernels.errors import CheckpointError

from .model import PlainUNet, PlainUNetConfig

_SCALINGS = {"ZScoreNormalization": "zscore", "RescaleTo01Normalization": "minmax", "NoNormalization": "as_is"}
_NO_PLANS = (
    "no plans lie beside its weights: trifuse predict takes z-scores, and asks for the spacing that it was trained at"
)
_WRAPPERS = f"(?:{WRAPPER})*"
_ALIASES = (
    (r"^decoder\.encoder\.", "encoder."),
    (r"(\.convs\.\d+)\.all_modules\.0\.", r"\1.conv."),
    (r"(\.convs\.\d+)\.all_modules\.1\.", r"\1.norm."),
)
_STRANGERS = (
    (r"encoder\.stem\.|encoder\.stages\.\d+\.blocks\.", "nnU-Net's residual encoder (ResEnc)"),
    (r"conv_blocks_context\.|conv_blocks_localization\.", "a network of nnU-Net v1"),
)
_FIRST = "encoder.stages.0.0.convs.0.conv.weight"
_UP = re.compile(r"decoder\.transpconvs\.\d+\.weight")
_CONV = re.compile(r"encoder\.stages\.(\d+)\.0\.convs\.0\.conv\.weight")
_HEAD = "decoder.seg_layers.0.weight"


def convert_nnunet(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> ConversionReport:
    """Convert a checkpoint of nnU-Net v2 to a folder that `PlainUNet.from_pretrained` loads.

    Args:
        path: a ``.pth`` file that nnU-Net wrote, or its state dict alone, ``.pth`` or ``.safetensors``.
        out: the folder to write: ``model.safetensors`` under nnU-Net's own names, and ``config.json``.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, is not a whole plain 2D U-Net, or lies in ``out``.
    """
    return convert_weights(path, out, PlainUNet.architecture, read_nnunet)


def read_nnunet(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], ConversionReport]:
    """Read a checkpoint and keep one name for each of its tensors.

    Args:
        path: a folder written by `convert_nnunet`, or a ``.pth`` or ``.safetensors`` file.

    Raises:
        CheckpointError: nothing is there, it is damaged, holds code, or is not a whole plain 2D U-Net.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return rename_nnunet(read_tensors(path, PlainUNet.architecture), str(path))
    content = read_pickled(path)
    state, report = rename_nnunet(tensors_in(content, path), str(path))
    return state, with_plans(report, content)


def with_plans(report: ConversionReport, content: Any) -> ConversionReport:
    """Add how images were prepared for a network, by the plans that nnU-Net saves beside its weights.

    A way of scaling that `Preprocessing` lacks keeps nnU-Net's name, by which prediction refuses it.

    Raises:
        CheckpointError: the plans are not what nnU-Net writes.
    """
    arguments = content.get("init_args") if isinstance(content, dict) else None
    if not (isinstance(arguments, dict) and isinstance(arguments.get("plans"), dict)):
        return replace(report, notes=(*report.notes, _NO_PLANS))
    try:
        configurations = arguments["plans"]["configurations"]
        plan = configurations[arguments["configuration"]]
        plan = {**configurations[plan["inherits_from"]], **plan} if "inherits_from" in plan else plan
        schemes, masked = plan["normalization_schemes"], any(plan.get("use_mask_for_norm", ()))
        spacing_mm, sides = (tuple(plan[name]) for name in ("spacing", "patch_size"))
        scheme = listed(dict.fromkeys(schemes)) + (" within the object" if masked else "")
        patches = Patches((float(spacing_mm[-2]), float(spacing_mm[-1])))
        prepared = replace(nnunet_data().preprocessing, image_size=int(min(sides)), patches=patches)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{report.source}: expected nnU-Net's plans in init_args, got {got}") from error
    notes = []
    if len(set(sides)) > 1:
        notes.append(f"it was trained on patches of {' x '.join(map(str, sides))}: predicts by squares of {min(sides)}")
    if scheme not in _SCALINGS:
        notes.append(f"its images were scaled by {scheme}, which trifuse does not do: trifuse predict will refuse it")
    preprocessing = {**config_to_json(prepared), "intensity": _SCALINGS.get(scheme, scheme)}
    return replace(report, further={"preprocessing": preprocessing}, notes=(*report.notes, *notes))


def rename_nnunet(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], ConversionReport]:
    """Remove wrappers and second names from a state dict.

    Args:
        tensors: a state dict of the published network.
        source: where it came from, for the report.

    Raises:
        CheckpointError: the tensors are not exactly those of one plain 2D U-Net, or two names of one differ.
    """
    state: dict[str, Tensor] = {}
    mapped: dict[str, str] = {}
    for name, tensor in tensors.items():
        ours = _without_aliases(re.sub(f"^{_WRAPPERS}", "", name))
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: expected {name!r} of a floating-point type, got {tensor.dtype}")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{source}: {name!r} holds NaN or infinite numbers; did its training fail?")
        first = state.setdefault(ours, tensor)
        if first.dtype != tensor.dtype or not torch.equal(first, tensor):
            raise CheckpointError(
                f"{source}: {name!r} differs from what else is called {ours!r}; nnU-Net writes both alike, so the file "
                "mixes two networks or was changed"
            )
        mapped[name] = ours
    config = _detect(state, source)
    with torch.device("meta"):  # names and shapes without memory for the weights
        wanted = PlainUNet(config).state_dict()
    strangers = [name for name, ours in mapped.items() if ours not in wanted]
    return compare(source, config, state, wanted, mapped=mapped, ignored=[], unexpected=strangers)


def _without_aliases(name: str) -> str:
    for pattern, replacement in _ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def _detect(state: Mapping[str, Tensor], source: str) -> PlainUNetConfig:
    """Infer the network from names and shapes, and the size of its images from its number of stages."""
    _refuse_strangers(state, source)
    first, head = state[_FIRST], state[_HEAD]
    convs = {int(match[1]): len(conv) for name, conv in state.items() if (match := _CONV.fullmatch(name)) and conv.ndim}
    features = tuple(convs[stage] for stage in sorted(convs))
    try:
        config = PlainUNetConfig(
            in_channels=first.shape[1],
            num_classes=len(head),
            image_size=4 * 2 ** (len(features) - 1),
            base_dim=features[0],
            max_dim=max(features),
        )
    except ValueError as error:
        raise CheckpointError(f"{source}: holds a network that PlainUNet cannot be: {error}") from error
    if config.features != features:
        raise CheckpointError(
            f"{source}: expected channels that double from stage to stage up to a largest number, got "
            f"{', '.join(map(str, features))}"
        )
    return config


def _refuse_strangers(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors of anything but a plain U-Net of two dimensions, and describe what was found."""
    for pattern, what in _STRANGERS:
        if any(re.match(pattern, name) for name in state):
            raise CheckpointError(f"{source}: holds {what}; only nnU-Net v2's PlainConvUNet can be converted")
    first = state.get(_FIRST)
    if first is not None and first.ndim == 5:
        raise CheckpointError(f"{source}: holds a 3D network; convert one of the configuration '2d'")
    ups = [tensor for name, tensor in state.items() if _UP.fullmatch(name)]
    head = state.get(_HEAD)
    if first is None or head is None or (first.ndim, head.ndim) != (4, 4) or not ups:
        raise CheckpointError(
            f"{source}: expected the weights of nnU-Net v2's PlainConvUNet, found no encoder.stages of convolutions "
            "with decoder.transpconvs and decoder.seg_layers"
        )
    strides = [tuple(up.shape[2:]) for up in ups]
    if set(strides) != {(2, 2)}:
        raise CheckpointError(
            f"{source}: expected stages that halve both axes, got strides {strides}; this network was planned for "
            "patches much longer than wide"
        )
