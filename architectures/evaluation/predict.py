"""Predict label maps on the native grid of volumes, one case at a time; files appear whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
from trifuse.architectures.storage.atomic_files import remove_leftovers
from trifuse.architectures.storage.config_json import config_from_json, config_to_json
from trifuse.architectures.storage.file_names import real_path
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.architectures.storage.safetensors_file import digest_of_tensors
from trifuse.architectures.storage.text import count, listed
from trifuse.kernels import CheckpointError, DataError, NumericError, upsample_argmax

from .inference import evaluating, refuse_non_finite
from .scoring import find_cases, prediction_path
from .sliding_window import sliding_window_inference

MANIFEST = "predictions.json"
_EXTRAS, _IMAGES = "extras_sha256", "images_sha256"  # of each case, in the manifest


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
    batch_size: int = 8,
    device: torch.device | str | None = None,
    side_inputs: Mapping[str, SideInputs | DataError] | None = None,
    replace: bool = False,
) -> list[Path]:
    """Predict cases of a cohort into ``out/<case_id>.nii.gz``, class ids on each image's own grid.

    A label map that is there already, and was made of the same image, is kept, so a run that was stopped or met a
    broken file goes on where it was; one of another image is made anew. A note on stderr says which are which. A
    broken case does not stop the others: it is reported at the end.

    Args:
        model, batch_size, device: see `predict_volume`.
        cohort: where the images are.
        case_ids: the cases to predict.
        out: folder for the label maps, of this model's predictions alone.
        preprocessing: as in training, see `predict_labels`.
        side_inputs: what the cases bring beside their images, or what is wrong with it; only with ``patches``.
        replace: make label maps anew that another network made, or of which that is not known, instead of refusing.

    Returns:
        The paths of all predictions, in the order of ``case_ids``.

    Raises:
        DataError: nothing to do, an unknown case, an output folder that holds inputs or another model's predictions.
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
    made_by = _MadeBy(digest_of_tensors(model.state_dict()), preprocessing)
    images = {case.case_id: _image_of(case, preprocessing) for case in cases}
    folder = _Folder(out, made_by, images, replace=replace)
    broken = {name: one for name, one in brought.items() if isinstance(one, DataError)}
    folder.open({name: one.digest() if isinstance(one, SideInputs) else None for name, one in brought.items()}, broken)
    problems: list[DataError] = []
    for case in tqdm(cases, desc="predict", unit="case", disable=not sys.stderr.isatty()):
        if case.case_id in folder.kept:
            continue
        try:
            volume = load_image(case, nonfinite=preprocessing.nonfinite)
            if isinstance(given := brought[case.case_id], DataError):
                raise given
            labels = predict_labels(model, volume, preprocessing, given, batch_size, device)
            write_labels(prediction_path(out, case.case_id), labels, like=volume)
            folder.add(case.case_id)
        except (DataError, NumericError) as error:
            problems.append(NotPredicted(case.case_id, "not predicted", got=error))
    if problems:
        raise NotPredicted.merge(problems)
    return [prediction_path(out, case.case_id) for case in cases]


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


@dataclass(frozen=True)
class _MadeBy:
    """What a folder's predictions were made with, as its manifest has it.

    What was done with voxels that are no numbers does not count: it is chosen for images, not for a network.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "preparation": "preprocessing",
        "image_size": "preprocessing.image_size",
        "patches": "preprocessing.patches",
    }

    weights_sha256: str
    preprocessing: Preprocessing

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's values."""
        values = config_to_json(self)
        del values["preprocessing"]["nonfinite"]
        return values


def _image_of(case: Case, preprocessing: Preprocessing) -> str:
    """Name what a case's label map is made of: the digest of its image, and what became of voxels without a number.

    Of an image whose voxels are all numbers that says nothing, and such it is where others are refused.
    """
    try:
        digest = case.image_digest()
    except OSError:
        return ""  # reading it will say why
    return digest if preprocessing.nonfinite == "error" else f"{digest} {preprocessing.nonfinite}"


def made_of_these_images(out: Path, cohort: Cohort, case_ids: Sequence[str], preprocessing: Preprocessing) -> bool:
    """Tell whether a folder of label maps records that those of these cases were made of the images that there are now.

    Older versions recorded no images: theirs are believed.

    Raises:
        DataError: the record is damaged.
    """
    manifest = Path(out) / MANIFEST
    recorded = _read_manifest(manifest)[2] if manifest.exists() else None
    if recorded is None:
        return True
    images = {case.case_id: _image_of(case, preprocessing) for case in cohort.cases if case.case_id in case_ids}
    return all(_is_of(image, recorded.get(case_id)) for case_id, image in images.items())


def _is_of(image: str, made_of: str | None) -> bool:
    """Tell whether what a label map was made of is this image; both see `_image_of`."""
    return bool(image) and made_of in (image, image.partition(" ")[0])


class _Folder:
    """A folder of label maps, and the manifest that says what each was made of.

    Args:
        out: the folder.
        made_by: the network that is to make them.
        images: what each case is made of now, see `_image_of`.
        replace: whether label maps that another network made are outdated, or a reason to refuse the folder.

    Attributes:
        kept: the cases whose label maps are there, of the same images.
        outdated: those whose label maps are there, but of other images, or of images that are not recorded.
    """

    def __init__(self, out: Path, made_by: _MadeBy, images: Mapping[str, str], *, replace: bool) -> None:
        self._replace = replace
        self._out, self._manifest, self._made, self._images = out, out / MANIFEST, made_by.to_json(), images
        self.kept: set[str] = set()
        self.outdated: list[str] = []

    def open(self, side_inputs: Mapping[str, str | None], broken: Collection[str]) -> None:
        """Create the folder, or accept it if the same model made what is in it; clean up what a killed run left.

        Of the side inputs, those of every case that is kept must be the same; of a ``broken`` one none is kept.
        """
        out, manifest = self._out, self._manifest
        if out.exists() and not out.is_dir():
            raise DataError(out, "output folder", got="a file", want="a folder, new or of the same model's predictions")
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        before: dict[str, str] = {}
        self._recorded: dict[str, str] = {}
        if manifest.exists():
            try:
                before, self._recorded = self._compare(*_read_manifest(manifest))
            except DataError:
                if not self._replace:
                    raise
        elif not self._replace and any(out.glob("*.nii.gz")):
            raise DataError(out, "output folder", got="volumes of unknown origin", want="an empty or a new folder")
        there = [case_id for case_id in side_inputs if prediction_path(out, case_id).exists()]
        same = {case_id for case_id in there if _is_of(self._images[case_id], self._recorded.get(case_id))}
        self.kept = same.difference(broken)
        changed = [name for name in there if name in self.kept and before.get(name) != side_inputs[name]]
        if self._replace:
            self.kept -= {*changed}
        elif changed:
            other = f"another prior or ECG of {listed(changed)}"
            raise DataError(manifest, "made by", got=other, want="the same ones", hint="choose another output folder")
        self.outdated = [case_id for case_id in there if case_id not in self.kept]
        self._extras = {**before, **{name: digest for name, digest in side_inputs.items() if digest is not None}}
        for case_id in self._images.keys() - self.kept:
            self._recorded[case_id] = self._images[case_id]
        for case_id in self.outdated:  # until it is made anew
            del self._recorded[case_id]
        self._write()
        self._say()

    def _compare(
        self, made: Mapping[str, Any], extras: dict[str, str], images: dict[str, str] | None
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Return the recorded digests of side inputs and images, if they are of label maps by the same network."""
        if differences := {name: (old, new) for name, old, new in _differences(made, self._made)}:
            got, want = ({name: pair[which] for name, pair in differences.items()} for which in (0, 1))
            raise DataError(self._manifest, "made by", got=got, want=want, hint="choose another output folder")
        return extras, images or {}

    def add(self, case_id: str) -> None:
        """Record what a new label map is made of."""
        if case_id in self.outdated:
            self._recorded[case_id] = self._images[case_id]
            self._write()

    def _write(self) -> None:
        extras = {_EXTRAS: self._extras} if self._extras else {}
        write_record(self._manifest, {**self._made, **extras, _IMAGES: self._recorded})

    def _say(self) -> None:
        said = [f"{count(len(self.kept), 'label map')} kept, of the same images"] if self.kept else []
        if self.outdated:
            of = "their images or the network have changed, or nothing says which they were"
            said.append(f"{count(len(self.outdated), 'label map')} made anew, because {of}: {listed(self.outdated)}")
        if said:
            print(f"note: {self._out}: {'; '.join(said)}", file=sys.stderr)


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], section: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted name and both values of what differs, sections that both have field by field."""
    for name, value in wanted.items():
        other = found[name]
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(other, value, f"{section}{name}.")
        elif value != other:
            yield f"{section}{name}", other, value


def _read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, str] | None]:
    """Return what a folder's predictions were made with, in names of today, and digests of side inputs and images.

    Of images that is None where an older version recorded none.
    """
    try:
        values = read_record(path)
        images = dict(values.pop(_IMAGES)) if _IMAGES in values else None
        extras = dict(values.pop(_EXTRAS, {}))
        return config_from_json(_MadeBy, values, path).to_json(), extras, images
    except (ValueError, TypeError, CheckpointError):
        raise DataError(path, "made by", got="a damaged file", want="what trifuse predict wrote") from None
