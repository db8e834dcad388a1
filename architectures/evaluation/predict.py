"""Volumes in, label maps on the native grid out: slice by slice, one case at a time, never half a file."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from trifuse.architectures.files import remove_leftovers, write_json
from trifuse.architectures.weights_file import bytes_of
from trifuse.kernels import DataError, NumericError

from .scoring import find_cases, prediction_path

if TYPE_CHECKING:
    from trifuse.architectures.data.cases import Case, Study
    from trifuse.architectures.data.volume import Volume
    from trifuse.architectures.data.voxel_values import NonFinite

MANIFEST = "predictions.json"


def predict_volume(
    model: nn.Module,
    volume: Volume,
    image_size: int,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> NDArray[np.uint8]:
    """Return class ids of shape (D, H, W) for a volume of that shape.

    Slices are prepared as in training and run in batches; logits are resized to (H, W) before the argmax and dropped
    at once, so memory grows with the batch and the labels, not with classes times volume. One logit per pixel means
    a sigmoid: foreground where it is positive.

    Args:
        model: maps (B, 3, S, S) to logits (B, K, s, s). Moved to ``device``; its training mode is restored.
        volume: the volume, slices first.
        image_size: S, as in training.
        batch_size: slices at a time.
        device: where to run; by default where the model's parameters are.

    Raises:
        NumericError: a logit is not finite; the slices are named.
    """
    depth, height, width = volume.voxels.shape
    labels = np.empty((depth, height, width), np.uint8)
    for start, logits in _logits(model, volume, image_size, batch_size, device):
        native = nn.functional.interpolate(logits.float(), size=(height, width), mode="bilinear", align_corners=False)
        chosen = native[:, 0] > 0 if native.shape[1] == 1 else native.argmax(dim=1)
        labels[start : start + len(chosen)] = chosen.to(torch.uint8).cpu().numpy()
    return labels


def predict_cases(
    model: nn.Module,
    study: Study,
    case_ids: Sequence[str],
    out: Path,
    *,
    image_size: int,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    nonfinite: NonFinite = "error",
) -> list[Path]:
    """Predict cases of a study into ``out/<case_id>.nii.gz``, class ids on each image's own grid.

    A case that is already there is not done again, so a run that was stopped or met a broken file goes on where it
    was. A broken case does not stop the others: it is reported at the end.

    Args:
        model, image_size, batch_size, device: see `predict_volume`.
        study: where the images are.
        case_ids: the cases to predict.
        out: folder for the label maps, of this model's predictions alone.
        nonfinite: what to do with NaN and infinite voxels, see ``read_image``.

    Returns:
        The paths of all predictions, in the order of ``case_ids``.

    Raises:
        DataError: nothing to do, an unknown case, an output folder that holds inputs or another model's predictions;
            or, after all the others are written, the cases that could not be predicted.
    """
    from trifuse.architectures.data.nifti import read_image, write_labels

    out = Path(out)
    cases = find_cases(study, case_ids)
    _refuse_input_folder(out, study, cases)
    _claim_folder(out, {"weights_sha256": weights_digest(model), "image_size": image_size})
    problems = []
    for case in tqdm(cases, desc="predict", unit="case", disable=not sys.stderr.isatty()):
        path = prediction_path(out, case.case_id)
        if path.exists():
            continue
        try:
            volume = read_image(case.image, nonfinite=nonfinite)
            write_labels(path, predict_volume(model, volume, image_size, batch_size, device), like=volume)
        except (DataError, NumericError) as error:
            problems.append(DataError(case.case_id, "not predicted", got=error))
    if problems:
        raise DataError.merge(problems)
    return [prediction_path(out, case.case_id) for case in cases]


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state: names, types, shapes and bytes, independent of the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor.detach()))
    return digest.hexdigest()


def _logits(
    model: nn.Module, volume: Volume, image_size: int, batch_size: int, device: torch.device | str | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first slice, logits) for consecutive batches of slices."""
    from trifuse.architectures.data.slices import network_input, scaled_slices

    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    slices = scaled_slices(volume, image_size)
    was_training = model.training
    model.to(device).eval()
    try:
        for start in range(0, len(slices), batch_size):
            with torch.inference_mode():
                logits = model(network_input(slices[start : start + batch_size]).to(device))
            finite = torch.isfinite(logits).flatten(1).all(dim=1).cpu()
            if not finite.all():
                bad = [start + int(index) for index in torch.nonzero(~finite)]
                raise NumericError(f"the network returned NaN or infinity for slices {bad} (counted from 0)")
            yield start, logits
    finally:
        model.train(was_training)


def _refuse_input_folder(out: Path, study: Study, cases: Sequence[Case]) -> None:
    inputs = {path.resolve().parent for case in cases for path in (case.image, case.label) if path is not None}
    if out.resolve() in inputs | {Path(study.root).resolve()}:
        raise DataError(out, "output folder", got="the folder of the input", want="a folder of its own")


def _claim_folder(out: Path, made_by: dict[str, object]) -> None:
    """Create the folder, or accept it if the same model made what is in it; clean up what a killed run left."""
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    manifest = out / MANIFEST
    if manifest.exists():
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            found = "a damaged file"
        if found != made_by:
            raise DataError(manifest, "made by", got=found, want=made_by, hint="choose another output folder")
    elif any(out.glob("*.nii.gz")):
        raise DataError(out, "output folder", got="volumes of unknown origin", want="an empty or a new folder")
    else:
        write_json(manifest, made_by)
