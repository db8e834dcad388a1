"""What a folder of encoder weights decides of a network: converted ones, or a model of Hugging Face."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trifuse.architectures.storage.pretrained import CONFIG_FILE, read_description
from trifuse.kernels import CheckpointError

from .backbone_encoder import is_hugging_face, read_backbone
from .dinov3_names import ARCHITECTURE as DINOV3
from .published_names import ARCHITECTURE as DINOV2


def describe_encoder(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the fields of a `DinoUNetConfig` that a folder of encoder weights decides.

    Args:
        folder: written by ``trifuse convert``, or by ``save_pretrained`` of a Hugging Face model.

    Raises:
        CheckpointError: neither of the two is there, or it is damaged.
        MissingExtra: it is Hugging Face's, and transformers is not installed.
    """
    folder = Path(folder)
    if is_hugging_face(folder):
        return {"backbone": read_backbone(folder)}
    description = read_description(folder)
    if (architecture := description.get("architecture")) not in (DINOV2, DINOV3):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: wrong architecture: got {architecture!r}, want {DINOV2!r} or {DINOV3!r}"
        )
    described: dict[str, Any] = description["config"]
    return described
