"""Using a finished network: load it by its folder, whatever it is, and segment images with it."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from trifuse.kernels import CheckpointError

from .data.cases import open_images
from .data.voxel_values import NonFinite
from .evaluation.predict import predict_cases
from .pretrained import read_description
from .recipes import DataRecipe
from .training.distributed import choose_device

ARCHITECTURES = ("dino_unet",)


def load_network(folder: Path) -> tuple[Any, int]:
    """Return the network of a run, or of a folder that ``save_pretrained`` wrote, and the image size it was trained at.

    The size is that of the run; a network without a run gets DINOv2's 448 pixels.

    Raises:
        CheckpointError: there is no network of ours, or it is damaged.
    """
    run = folder / "run.json"
    weights = folder / "best" if run.exists() else folder
    architecture = read_description(weights)["architecture"]
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{weights}: unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    package = import_module(f"{__package__}.{architecture}")
    network = next(value for value in vars(package).values() if getattr(value, "architecture", None) == architecture)
    size = _trained_size(run) if run.exists() else DataRecipe.image_size
    return network.from_pretrained(weights), size


def _trained_size(run: Path) -> int:
    try:
        return int(json.loads(run.read_bytes())["config"]["data"]["image_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run}: expected the description of a run of trifuse, found {error!r}") from error


def predict_images(
    model_folder: Path,
    images: Path,
    out: Path,
    *,
    image_size: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    nonfinite: NonFinite = "error",
) -> list[Path]:
    """Segment a NIfTI file, a folder of them, or the images of a study; return the paths of the label maps."""
    model, trained_size = load_network(model_folder)
    study = open_images(images)
    model.to(choose_device(device))
    cases = [case.case_id for case in study.cases]
    size = image_size or trained_size
    return predict_cases(model, study, cases, out, image_size=size, batch_size=batch_size, nonfinite=nonfinite)
