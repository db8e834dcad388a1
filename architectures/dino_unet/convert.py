"""Convert published DINOv2 and DINOv3 weights, in any of their layouts, to a folder that the encoder loads.

Which names they are published under is in `published_names` and `dinov3_names`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from trifuse.architectures.storage.published_weights import ConversionReport, convert_weights

from . import dinov3_encoder, dinov3_names
from .encoder import expected_weights
from .published_names import ARCHITECTURE, read_renamed, renamed


def convert_dinov2(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> ConversionReport:
    """Convert a published DINOv2 checkpoint to a folder that `DinoV2Encoder` loads.

    Args:
        path: a ``.pth`` or ``.safetensors`` file in any of the published layouts.
        out: the folder to write: ``model.safetensors`` under the original names, types and position table, and
            ``config.json``.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, is not a whole DINOv2 encoder, or lies in ``out``.
    """
    return convert_weights(path, out, ARCHITECTURE, read_dinov2)


def load_dinov2_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the encoder's names; see `read_dinov2`."""
    return read_dinov2(path)[0]


def read_dinov2(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], ConversionReport]:
    """Read a checkpoint and bring it under the encoder's names.

    Args:
        path: a folder written by `convert_dinov2`, or a ``.pth`` or ``.safetensors`` file in any published layout.

    Raises:
        CheckpointError: nothing is there, it is damaged, holds code, or is not a whole DINOv2 encoder.
    """
    return read_renamed(Path(path), expected_weights)


def rename_dinov2(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], ConversionReport]:
    """Bring tensors in any published layout under the encoder's names.

    Args:
        tensors: a state dict, e.g. that of transformers' ``Dinov2Model``. A mask token that is missing becomes zeros:
            the encoder never uses it.
        source: where it came from, for the report.

    Raises:
        CheckpointError: the tensors are not exactly those of one DINOv2 encoder, training heads aside.
    """
    return renamed(tensors, source, expected_weights)


def convert_dinov3(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> ConversionReport:
    """Convert a published DINOv3 checkpoint to a folder that `DinoV3Encoder` loads.

    Args:
        path: a ``.pth`` or ``.safetensors`` file in either published layout.
        out: the folder to write: ``model.safetensors``, and ``config.json``, which also states the weights' licence.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, is not a whole DINOv3 encoder, or lies in ``out``.
    """
    return convert_weights(path, out, dinov3_names.ARCHITECTURE, read_dinov3)


def read_dinov3(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], ConversionReport]:
    """Read a checkpoint and bring it under the names of `DinoV3Encoder`; see `convert_dinov3`."""
    return dinov3_names.read_renamed(Path(path), dinov3_encoder.expected_weights)


def rename_dinov3(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], ConversionReport]:
    """Bring tensors in either published layout, e.g. of transformers' ``DINOv3ViTModel``, under the encoder's names.

    Raises:
        CheckpointError: the tensors are not exactly those of one DINOv3 encoder.
    """
    return dinov3_names.renamed(tensors, source, dinov3_encoder.expected_weights)
