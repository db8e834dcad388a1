"""Predict label maps on the native grid of volumes, one case at a time; files appear whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from trifuse.architectures.data.layouts.cohort import Case, Cohort
from trifuse.architectures.data.layouts.read_case import load_image
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.samples.side_inputs import SideInputs, side_inputs_of
from trifuse.architectures.data.samples.volume_to_slices import network_input, resized_labels, scaled_slices
from trifuse.architectures.data.volumes.nifti import write_labels
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.architectures.storage.file_names import real_path
from trifuse.architectures.storage.safetensors_file import digest_of_tensors
from trifuse.kernels import DataError, NumericError, upsample_argmax

from .inference import evaluating, refuse_non_finite
from .prediction_folder import MadeBy, PredictionFolder, image_of
from .scoring import find_cases, prediction_path
from .sliding_window import sliding_window_inference


class NotPredicted(DataError):
    """Cases could not be predicted; all others were."""

    @property
    def by_case(self) -> dict[str, DataError]:
        """What is wrong with each case."""
        return {str(error.file): error for error in self.errors or [self]}


def predict_volume(
    model: nn.Module,
    volume: Volume,
    preprocessing: Preprocessing,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> NDArray[np.uint8]:
    """Return class ids of shape (D, H, W) for a volume of that shape.

    Slices are prepared as in training and run in batches; each batch becomes labels at once, so memory grows with the
    batch and the labels, not with classes times volume. One logit per pixel means a sigmoid: foreground where it is
    positive. A network that has ``head_maps`` is asked for these, and they are added up at the size of the labels.

    Args:
        model: maps (B, C, S, S) to logits (B, K, s, s). Moved to ``device``; its training mode is restored.
        volume: the volume, slices first.
        preprocessing: of the slices, as in training; its ``image_size`` is S. It also says whether logits are resized
            to (H, W) before the argmax, or labels of S x S after it.
        batch_size: slices at a time.
        device: where to run; by default where the model's parameters are.

    Raises:
        NumericError: a logit is not finite; the slices are named.
    """
    depth, *native = volume.voxels.shape
    side = preprocessing.image_size
    size = (native[0], native[1]) if preprocessing.restore == "logits" else (side, side)
    labels = np.empty((depth, *size), np.uint8)
    slices = scaled_slices(volume, preprocessing)
    for start, maps in _head_maps(model, slices, preprocessing, batch_size, device):
        chosen = _choose(maps, size).cpu().numpy()
        labels[start : start + len(chosen)] = chosen
    return (
        labels if preprocessing.restore == "logits" else resized_labels(labels, (native[0], native[1]), preprocessing)
    )


def predict_labels(
    model: nn.Module,
    volume: Volume,
    preprocessing: Preprocessing,
    side_inputs: SideInputs | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> NDArray[np.uint8]:
    """Return class ids of shape (D, H, W) for a volume of that shape, as the network was trained to see it.

    Args:
        model, volume, batch_size, device: see `predict_volume`.
        preprocessing: as in training. With ``patches``, slices are predicted by `sliding_window_inference`, else whole
            by `predict_volume`.
        side_inputs: what the case brings beside its image; only with ``patches``.

    Raises:
        NumericError: a logit is not finite; the slices are named.
    """
    if preprocessing.patches is None:
        return predict_volume(model, volume, preprocessing, batch_size, device)
    return sliding_window_inference(model, volume, preprocessing, side_inputs, batch_size, device)


def predict_cases(
    model: nn.Module,
    cohort: Cohort,
    case_ids: Sequence[str],
    out: Path,
    preprocessing: Preprocessing,
    *,
    batch_size: int | Mapping[str, int] = 8,
    device: torch.device | str | None = None,
    side_inputs: Mapping[str, SideInputs | DataError] | None = None,
    replace: bool = False,
) -> list[Path]:
    """Predict cases of a cohort into ``out/<case_id>.nii.gz``, class ids on each image's own grid.

    A label map that is there already, and was made of the same image, is kept, so a run that was stopped or met a
    broken file goes on where it was; one of another image is made anew. A note on stderr says which are which. One
    that somebody else made or changed is refused, so that no correction by hand is lost. A broken case does not stop
    the others: it is reported at the end.

    Args:
        model, device: see `predict_volume`.
        batch_size: see there; one for all cases, or one for each, such as `batch_sizes_within` finds.
        cohort: where the images are.
        case_ids: the cases to predict.
        out: folder for the label maps, of this model's predictions alone.
        preprocessing: as in training, see `predict_labels`.
        side_inputs: what the cases bring beside their images, or what is wrong with it; only with ``patches``.
        replace: make label maps anew that another network or somebody else made or changed, instead of refusing.

    Returns:
        The paths of all predictions, in the order of ``case_ids``.

    Raises:
        DataError: nothing to do, an unknown case, an output folder that holds inputs, another model's predictions, or
            label maps of somebody else.
        NotPredicted: after all the others are written, the cases that could not be predicted.
    """
    if side_inputs is not None and preprocessing.patches is None:
        raise ValueError("side_inputs: expected none for whole slices; networks that take them see patches")
    out = Path(out)
    cases = find_cases(cohort, case_ids)
    _refuse_input_folder(out, cohort, cases)
    brought = {
        case.case_id: None if side_inputs is None else side_inputs_of(side_inputs, case.case_id) for case in cases
    }
    made_by = MadeBy(digest_of_tensors(model.state_dict()), preprocessing)
    images = {case.case_id: image_of(case, preprocessing) for case in cases}
    folder = PredictionFolder(out, made_by, images, replace=replace)
    broken = {name: one for name, one in brought.items() if isinstance(one, DataError)}
    folder.open({name: one.digest() if isinstance(one, SideInputs) else None for name, one in brought.items()}, broken)
    problems: list[DataError] = []
    for case in tqdm(cases, desc="predict", unit="case", disable=not sys.stderr.isatty()):
        if case.case_id in folder.kept:
            continue
        at_once = batch_size if isinstance(batch_size, int) else batch_size[case.case_id]
        try:
            written = partial(folder.add, case.case_id)
            path = prediction_path(out, case.case_id)
            _predict_case(model, case, path, preprocessing, brought[case.case_id], at_once, device, written)
        except (DataError, NumericError) as error:
            problems.append(NotPredicted(case.case_id, "not predicted", got=error))
    if problems:
        raise NotPredicted.merge(problems)
    return [prediction_path(out, case.case_id) for case in cases]


def _predict_case(
    model: nn.Module,
    case: Case,
    path: Path,
    preprocessing: Preprocessing,
    side_inputs: SideInputs | DataError | None,
    batch_size: int,
    device: torch.device | str | None,
    written: Callable[[Path], object],
) -> None:
    """Write the label map of a case; its arrays are gone before the next one is read."""
    volume = load_image(case, nonfinite=preprocessing.nonfinite)
    if isinstance(side_inputs, DataError):
        raise side_inputs
    labels = predict_labels(model, volume, preprocessing, side_inputs, batch_size, device)
    write_labels(path, labels, like=volume, before=written)


def _head_maps(
    model: nn.Module, slices: Tensor, preprocessing: Preprocessing, batch_size: int, device: torch.device | str | None
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (first slice, logit maps to be added up at one size) for consecutive batches of scaled slices."""
    compute = getattr(model, "head_maps", lambda image: [model(image)])
    with evaluating(model, device) as where:
        for start in range(0, len(slices), batch_size):
            with torch.inference_mode():
                maps = compute(network_input(slices[start : start + batch_size], preprocessing).to(where))
            refuse_non_finite(maps, range(start, start + len(maps[0])))
            yield start, maps


def _choose(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return the class of each pixel at ``size``, uint8; one logit is a sigmoid, positive where it says foreground."""
    if maps[0].shape[1] > 1:
        return upsample_argmax(maps, size)
    upsampled = [F.interpolate(m.float(), size=size, mode="bilinear", align_corners=False)[:, 0] for m in maps]
    return (torch.stack(upsampled).sum(dim=0) > 0).to(torch.uint8)


def _refuse_input_folder(out: Path, cohort: Cohort, cases: Sequence[Case]) -> None:
    inputs = {real_path(path).parent for case in cases for path in case.files}
    if real_path(out) in inputs | {real_path(Path(cohort.root))}:
        raise DataError(out, "output folder", got="the folder of the input", want="a folder of its own")
