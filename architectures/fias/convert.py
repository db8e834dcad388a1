"""Convert published DilateFormer weights to a folder that the encoder loads.

Which names they are published under is in `published_names`. Nothing in a file is ever executed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from trifuse.architectures.storage.published_weights import ConversionReport, convert_weights

from .dilateformer import expected_weights
from .published_names import ARCHITECTURE, read_renamed, renamed


def convert_dilateformer(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> ConversionReport:
    """Convert a published DilateFormer checkpoint to a folder that `DilateFormer` and `Fias` load.

    Args:
        path: a ``.pth`` or ``.safetensors`` file.
        out: the folder to write: ``model.safetensors`` under the published names, without the classifier, and
            ``config.json``.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, is not a whole DilateFormer, or lies in ``out``.
    """
    return convert_weights(path, out, ARCHITECTURE, read_dilateformer)


def read_dilateformer(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], ConversionReport]:
    """Read a checkpoint and bring it under the encoder's names.

    Args:
        path: a folder written by `convert_dilateformer`, or a published ``.pth`` or ``.safetensors`` file.

    Raises:
        CheckpointError: nothing is there, it is damaged, holds code, or is not a whole DilateFormer.
    """
    return read_renamed(Path(path), expected_weights)


def rename_dilateformer(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], ConversionReport]:
    """Remove wrappers and classifier from the names of a state dict.

    Args:
        tensors: a state dict of the published network.
        source: where it came from, for the report.

    Raises:
        CheckpointError: the tensors are not exactly those of one DilateFormer, its classifier aside.
    """
    return renamed(tensors, source, expected_weights)
