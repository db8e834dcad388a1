"""A folder becomes a study: which cases there are, which file is what, and what is wrong with them.

Two layouts are understood. ``lascarqs`` is the folder of the LAScarQS 2022 challenge, task 1::

    train_data/train_<n>/enhanced.nii.gz        the LGE volume
    train_data/train_<n>/atriumSegImgMO.nii.gz  the left-atrium cavity, anything above 0
    train_data/train_<n>/scarSegImgM.nii.gz     the scar, not used

``plain`` is any pair of folders whose files have the same names::

    images/<case>.nii.gz   (or <case>_0000.nii.gz, as nnU-Net calls the first channel)
    labels/<case>.nii.gz   (the folder may be absent: such a study can be predicted, not trained on)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from trifuse.kernels.errors import DataError

from .nifti import SUFFIXES, read_image, read_labels
from .volume import Volume
from .voxel_values import NonFinite

Layout = Literal["auto", "lascarqs", "plain"]
Targets = int | Mapping[str, int | Sequence[int]]

_LASCARQS_IMAGE, _LASCARQS_LABEL = "enhanced.nii.gz", "atriumSegImgMO.nii.gz"
_LASCARQS_FOLDER = re.compile(r"train_(\d+)")
_FIRST_CHANNEL = "_0000"


@dataclass(frozen=True)
class Case:
    """One image with its label map, if it has one, and the patient it comes from."""

    case_id: str
    patient: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class Study:
    """The cases of one folder and what their label values mean.

    Attributes:
        root: the folder.
        layout: ``"lascarqs"`` or ``"plain"``.
        class_names: names of the classes 0, 1, ..., the first being ``"background"``.
        label_map: class of each label value; None makes every value above 0 class 1.
        others_are_background: whether label values that ``label_map`` does not name become background (targets were
            chosen among them) or are an error.
        cases: sorted by name, numbers by value.
    """

    root: Path
    layout: str
    class_names: tuple[str, ...]
    label_map: Mapping[int, int] | None
    others_are_background: bool
    cases: tuple[Case, ...]

    def case(self, case_id: str) -> Case:
        """Return the case of that name.

        Raises:
            DataError: there is none.
        """
        for case in self.cases:
            if case.case_id == case_id:
                return case
        raise DataError(self.root, "case", got=case_id, want=f"one of {_listed(case.case_id for case in self.cases)}")


def open_study(
    root: Path, layout: Layout = "auto", targets: Targets | None = None, *, patient_pattern: str | None = None
) -> Study:
    """Find the cases below a folder, without reading their voxels.

    Args:
        root: the study's folder; for LAScarQS also the ``train_data`` folder itself.
        layout: ``"lascarqs"``, ``"plain"``, or ``"auto"`` to tell by the folders that are there.
        targets: for the plain layout, the label values to segment: one value, or names with one value or several
            each, e.g. ``{"lv": 3, "wall": [1, 2]}``; all other values are background. Without it labels must be 0
            and 1.
        patient_pattern: regular expression that finds the patient in a case's name (its first group, or all of the
            match), so that several images of one patient stay on one side of a split. Without it, every case is a
            patient.

    Raises:
        DataError: files are missing (all of them are listed), names collide, or no case was found.
    """
    study, problems = scan_study(root, layout, targets, patient_pattern=patient_pattern)
    if problems:
        raise DataError.merge(problems)
    return study


def scan_study(
    root: Path, layout: Layout = "auto", targets: Targets | None = None, *, patient_pattern: str | None = None
) -> tuple[Study, list[DataError]]:
    """Do as ``open_study``, but return what is wrong with names and files beside the study.

    Raises:
        DataError: there is no case at all, or the arguments make no sense.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(root, "folder", got="a file" if root.exists() else "nothing there", want="a folder of cases")
    found = _detect(root) if layout == "auto" else layout
    if found == "lascarqs":
        if targets is not None:
            raise DataError(root, "targets", got=targets, want="none: LAScarQS has one target, everything above 0")
        cases, problems = _scan_lascarqs(root)
        classes = _Classes(("background", "left atrium"), None, False)
    elif found == "plain":
        cases, problems = _scan_plain(root)
        classes = _classes(root, targets)
    else:
        raise ValueError(f"layout: expected one of {', '.join(get_args(Layout))}, got {layout!r}")
    cases = sorted(cases, key=lambda case: natural_key(case.case_id))
    cases, strangers = _with_patients(cases, patient_pattern)
    problems += strangers + _collisions(root, cases) + missing_files(cases)
    return Study(root, found, *classes, tuple(cases)), problems


def open_images(path: Path) -> Study:
    """Find images to segment: a NIfTI file, a folder that holds some, or the images of a study, labelled or not.

    Raises:
        DataError: there is no image, or two have the same name.
    """
    path = Path(path)
    if path.is_file():
        found = [file for file in _nifti_files(path.parent) if file[1] == path]
        if not found:
            raise DataError(path, "file name", got=path.name, want=f"one that ends in {' or '.join(SUFFIXES)}")
    else:
        found = list(_nifti_files(path)) if path.is_dir() else []
    cases = [Case(name, name, file, None) for name, file in found]
    if not cases:
        cases = [replace(case, label=None) for case in scan_study(path)[0].cases]
    cases.sort(key=lambda case: natural_key(case.case_id))
    if problems := _collisions(path, cases):
        raise DataError.merge(problems)
    root = path.parent if path.is_file() else path
    return Study(root, "images", ("background", "foreground"), None, False, tuple(cases))


def load_case(study: Study, case: Case, *, nonfinite: NonFinite = "error") -> tuple[Volume, Volume | None]:
    """Read a case: its image, and its labels as uint8 classes on the image's grid (None if it has none).

    Raises:
        DataError: a file is unusable, the grids differ, or a label value has no class.
    """
    image, raw = load_raw_case(case, nonfinite=nonfinite)
    return image, None if raw is None else map_labels(study, raw)


def load_raw_case(case: Case, *, nonfinite: NonFinite = "error") -> tuple[Volume, Volume | None]:
    """Read a case with its labels as they are stored.

    Raises:
        DataError: a file is unusable, or the grids differ.
    """
    image = read_image(case.image, nonfinite=nonfinite)
    return image, None if case.label is None else read_labels(case.label, like=image)


def map_labels(study: Study, raw: Volume) -> Volume:
    """Turn stored label values into uint8 classes.

    Raises:
        DataError: a value has no class; the message counts the values and suggests targets.
    """
    if study.label_map is None:
        classes = (raw.voxels > 0).astype(np.uint8)
    else:
        classes = np.zeros(raw.voxels.shape, np.uint8)
        for value, index in study.label_map.items():
            classes[raw.voxels == value] = index
        if not study.others_are_background:
            _refuse_strange_values(raw)
    return replace(raw, voxels=classes)


def missing_files(cases: Sequence[Case]) -> list[DataError]:
    """Return one error for every file that is not there."""
    problems = []
    for case in cases:
        for name, path in (("image", case.image), ("label", case.label)):
            if path is not None and not path.is_file():
                got = "a folder" if path.is_dir() else "nothing there"
                problems.append(DataError(path, f"{name} of case {case.case_id}", got=got, want="a file"))
    return problems


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a key that sorts ``case_2`` before ``case_10``."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts)


def _refuse_strange_values(raw: Volume) -> None:
    """Refuse values other than 0 and 1 where no targets were named."""
    values, counts = np.unique(raw.voxels, return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    if set(found) <= {0, 1}:
        return
    names = ", ".join(f'"class{value}": {value}' for value in found if value > 0)
    raise DataError(
        raw.path,
        "labels",
        got="; ".join(f"value {value} in {count} voxels" for value, count in found.items()),
        want="0 and 1",
        hint=f"name the values that you want to segment: targets={{{names}}}" if names else "",
    )


# --------------------------------------------------------------------------------------------- scanning


def _detect(root: Path) -> Literal["lascarqs", "plain"]:
    if (root / "images").is_dir():
        return "plain"
    if _lascarqs_folders(root):
        return "lascarqs"
    raise DataError(
        root,
        "layout",
        got=f"neither; it holds {_listed(sorted(path.name for path in root.iterdir())) or 'nothing'}",
        want=f"images/*.nii.gz (plain), or train_data/train_<n>/{_LASCARQS_IMAGE} (LAScarQS)",
    )


def _lascarqs_folders(root: Path) -> list[Path]:
    base = root / "train_data" if (root / "train_data").is_dir() else root
    return [path for path in base.iterdir() if _LASCARQS_FOLDER.fullmatch(path.name) and path.is_dir()]


def _scan_lascarqs(root: Path) -> tuple[list[Case], list[DataError]]:
    folders = _lascarqs_folders(root)
    if not folders:
        raise DataError(root, "cases", got="0 cases", want=f"train_data/train_<n>/{_LASCARQS_IMAGE}")
    cases = [Case(path.name, path.name, path / _LASCARQS_IMAGE, path / _LASCARQS_LABEL) for path in folders]
    return cases, []


def _scan_plain(root: Path) -> tuple[list[Case], list[DataError]]:
    images, labels = root / "images", root / "labels"
    image_files = list(_nifti_files(images)) if images.is_dir() else []
    if not image_files:
        raise DataError(root, "cases", got="0 cases", want="files that match images/*.nii.gz or images/*.nii")
    label_files = dict(_nifti_files(labels)) if labels.is_dir() else {}
    cases = []
    for name, path in image_files:
        case_id = name if name in label_files else name.removesuffix(_FIRST_CHANNEL)
        label = label_files.get(case_id, labels / f"{case_id}.nii.gz") if labels.is_dir() else None
        cases.append(Case(case_id, case_id, path, label))
    strangers = sorted(set(label_files) - {case.case_id for case in cases}, key=natural_key)
    problems = [
        DataError(label_files[name], "label", got="no image of that name", want=f"images/{name}.nii.gz")
        for name in strangers
    ]
    return cases, problems


def _nifti_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)
        if suffix and not path.name.startswith("."):
            yield path.name[: -len(suffix)], path


class _Classes(NamedTuple):
    names: tuple[str, ...]
    label_map: dict[int, int] | None
    others_are_background: bool


def _classes(root: Path, targets: Targets | None) -> _Classes:
    """Turn the targets into class names and the class of each label value."""
    if targets is None:
        return _Classes(("background", "foreground"), {0: 0, 1: 1}, False)
    if isinstance(targets, int):
        targets = {"target": targets}
    label_map: dict[int, int] = {}
    for index, (name, values) in enumerate(targets.items(), start=1):
        for value in [values] if isinstance(values, int) else values:
            if value == 0 or value in label_map:
                raise DataError(root, f"targets: {name}", got=value, want="label values other than 0, each named once")
            label_map[value] = index
    if not label_map:
        raise DataError(root, "targets", got="none", want="at least one label value")
    return _Classes(("background", *targets), label_map, True)


def _with_patients(cases: Sequence[Case], pattern: str | None) -> tuple[list[Case], list[DataError]]:
    """Find the patient in every case's name."""
    if pattern is None:
        return list(cases), []
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(pattern, "patient_pattern", got=str(error), want="a regular expression") from error
    named, problems = [], []
    for case in cases:
        match = expression.search(case.case_id)
        patient = (match.group(1) if expression.groups else match.group()) if match else None
        if not patient:
            problems.append(DataError(case.case_id, "patient", got="no match", want=f"a name that matches {pattern!r}"))
        named.append(replace(case, patient=patient or case.case_id))
    return named, problems


def _collisions(root: Path, cases: Sequence[Case]) -> list[DataError]:
    """Refuse names that a file system may take for the same: results are stored under them."""
    groups: dict[str, list[str]] = {}
    for case in cases:
        groups.setdefault(unicodedata.normalize("NFC", case.case_id).casefold(), []).append(case.case_id)
    return [
        DataError(
            root, "case names", got=" and ".join(names), want="names that differ by more than upper or lower case"
        )
        for names in groups.values()
        if len(names) > 1
    ]


def _listed(names: Iterable[object], most: int = 12) -> str:
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
