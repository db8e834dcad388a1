"""A folder becomes a cohort: which cases there are, which file is what, and what is wrong with them.

These layouts are understood; ``"auto"`` tells them apart by the files that are there:

===============  =====================================================================================
``lascarqs``     LAScarQS 2022, task 1: ``train_data/train_<n>/enhanced.nii.gz`` (the LGE volume) and
                 ``atriumSegImgMO.nii.gz`` (the left-atrium cavity, anything above 0)
``plain``        ``images/<case>.nii.gz`` and ``labels/<case>.nii.gz``; the second folder may be absent:
                 such a cohort can be predicted, not trained on
``nnunet``       nnU-Net's raw data set, see nnunet_raw.py
``synapse``      TransUNet's package of slices and volumes, see synapse.py
``acdc``         ACDC's folders of patients, see acdc.py, and
``acdc_slices``  slices and volumes made of them
``lge_ecg``      ``cases.csv``, which pairs LGE volumes with ECGs, see scar_cohort.py
===============  =====================================================================================
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Unpack, get_args

from trifuse.architectures.data.volumes.nifti import SUFFIXES, nifti_files
from trifuse.kernels.errors import DataError

from .acdc import acdc_classes, has_acdc_slices, patient_folders, scan_acdc, scan_acdc_slices
from .cohort import Case, Cohort, listed, missing_files, natural_key
from .found import Classes, CohortOptions, Found, LabelSpace, Targets, chosen_classes
from .lge_ecg import MAX_INTERVAL_DAYS, is_scar_cohort, scan_scar_cohort, scar_classes
from .nnunet import is_nnunet, scan_nnunet
from .synapse import is_synapse, scan_synapse, synapse_classes

Layout = Literal["auto", "lascarqs", "plain", "nnunet", "synapse", "acdc", "acdc_slices", "lge_ecg"]

_LASCARQS_IMAGE, _LASCARQS_LABEL = "enhanced.nii.gz", "atriumSegImgMO.nii.gz"
_LASCARQS_FOLDER = re.compile(r"train_(\d+)")
_FIRST_CHANNEL = "_0000"


def open_cohort(
    root: Path, layout: Layout = "auto", targets: Targets | None = None, **options: Unpack[CohortOptions]
) -> Cohort:
    """Find the cases below a folder, without reading their voxels.

    Args:
        root: the cohort's folder; for LAScarQS also the ``train_data`` folder itself.
        layout: a name of the table above, or ``"auto"`` to tell by the files that are there.
        targets: the label values to segment: one value, or names with one value or several each, e.g.
            ``{"lv": 3, "wall": [1, 2]}``; all other values are background. Without it labels must be 0 and 1 in the
            plain layout; others know the meaning of their labels. LAScarQS and Synapse have no choice.
        options: ``patient_pattern``, a regular expression that finds the patient in a case's name (its first group,
            or all of the match), so that several images of one patient stay on one side of a split; without it the
            layout knows the patient (ACDC), or every case is one.
            ``label_space``, how the labels of the Synapse package are numbered; needed there, and only there.
            ``frames``, which frames of the ACDC layout are cases: ``"ed"``, ``"es"``, or ``"both"``.
            ``channel``, name or number of the channel of an nnU-Net data set that has several.
            ``max_interval_days``, most days between ECG and MRI in the lge_ecg layout, 90 without it.

    Raises:
        DataError: files are missing (all of them are listed), names collide, or no case was found.
    """
    cohort, problems = scan_cohort(root, layout, targets, **options)
    if problems:
        raise DataError.merge(problems)
    return cohort


def scan_cohort(
    root: Path, layout: Layout = "auto", targets: Targets | None = None, **options: Unpack[CohortOptions]
) -> tuple[Cohort, list[DataError]]:
    """Do as ``open_cohort``, but return what is wrong with names and files beside the cohort.

    Raises:
        DataError: there is no case at all, or the arguments make no sense.
    """
    root = Path(root)
    name = layout_of(root, layout)
    _refuse_strange_options(root, name, options)
    found = _find(root, name, options)
    classes = _classes(root, name, found, targets, options.get("label_space"))
    cases, strangers = _with_patients(found.cases, options.get("patient_pattern"))
    problems = [*found.problems, *strangers, *_collisions(root, cases), *missing_files(cases)]
    cohort = Cohort(
        root, name, *classes[:3], tuple(cases), classes.largest_label, found.has_spacing, found.split, found.notes
    )
    return cohort, problems


def open_images(path: Path, *, channel: str | None = None) -> Cohort:
    """Find images to segment: a NIfTI file, a folder that holds some, or the images of a cohort, labelled or not.

    Args:
        path: the file or folder.
        channel: name or number of the channel of an nnU-Net data set that has several.

    Raises:
        DataError: there is no image, two have the same name, or it is not said which of several channels to take.
    """
    path = Path(path)
    if path.is_file():
        images = [file for file in nifti_files(path.parent) if file[1] == path]
        if not images:
            raise DataError(path, "file name", got=path.name, want=f"one that ends in {' or '.join(SUFFIXES)}")
    else:
        images = list(nifti_files(path)) if path.is_dir() else []
    found = Found([Case(name, name, file, None) for name, file in images])
    if not images:
        found = _find(path, layout_of(path), {"channel": channel})
        if channel is None and any(case.other_channels for case in found.cases):
            raise DataError.merge(found.problems)
    cases = sorted((replace(case, label=None) for case in found.cases), key=lambda case: natural_key(case.case_id))
    if problems := _collisions(path, cases):
        raise DataError.merge(problems)
    root = path.parent if path.is_file() else path
    classes = ("background", "foreground")
    return Cohort(root, "images", classes, None, False, tuple(cases), has_spacing=found.has_spacing)


# --------------------------------------------------------------------------------------------- scanning


_OWNERS = {"label_space": "synapse", "frames": "acdc", "channel": "nnunet", "max_interval_days": "lge_ecg"}


def _refuse_strange_options(root: Path, layout: str, options: CohortOptions) -> None:
    for field, owner in _OWNERS.items():
        value = options.get(field)
        if value not in (None, "both") and layout != owner:
            raise DataError(root, field, got=value, want=f"none: it belongs to the {owner} layout, this is {layout}")


def layout_of(root: Path, layout: Layout = "auto") -> str:
    """Return the name of a folder's layout, by the files that are there if ``layout`` leaves it open.

    Raises:
        DataError: there is no folder, or it looks like none that is known.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout: expected one of {', '.join(get_args(Layout))}, got {layout!r}")
    if not root.is_dir():
        raise DataError(root, "folder", got="a file" if root.exists() else "nothing there", want="a folder of cases")
    if layout != "auto":
        return layout
    signs = {
        "lge_ecg": is_scar_cohort(root),
        "nnunet": is_nnunet(root),
        "plain": (root / "images").is_dir(),
        "synapse": is_synapse(root),
        "acdc": bool(patient_folders(root)),
        "acdc_slices": has_acdc_slices(root),
        "lascarqs": bool(_lascarqs_folders(root)),
    }
    for name, seen in signs.items():
        if seen:
            return name
    raise DataError(
        root,
        "layout",
        got=f"none that is known; it holds {listed(sorted(path.name for path in root.iterdir())) or 'nothing'}",
        want=f"images/*.nii.gz (plain), train_data/train_<n>/{_LASCARQS_IMAGE} (lascarqs), dataset.json and imagesTr/ "
        "(nnunet), train_npz/ or test_vol_h5/ (synapse), */Info.cfg (acdc), train/*.npz (acdc_slices), or cases.csv "
        "(lge_ecg)",
    )


def _find(root: Path, layout: str, options: CohortOptions) -> Found:
    """Find the cases of a folder, sorted by name."""
    if layout == "nnunet":
        found = scan_nnunet(root, options.get("channel"))
    elif layout == "synapse":
        found = scan_synapse(root)
    elif layout == "acdc":
        found = scan_acdc(root, options.get("frames", "both"))
    elif layout == "acdc_slices":
        found = scan_acdc_slices(root)
    elif layout == "lge_ecg":
        allowed = options.get("max_interval_days")
        found = scan_scar_cohort(root, MAX_INTERVAL_DAYS if allowed is None else allowed)
    elif layout == "lascarqs":
        found = _scan_lascarqs(root)
    else:
        found = _scan_plain(root)
    if not found.cases:
        nothing = DataError(root, "cases", got="0 cases", want=_WANTED[layout])
        raise DataError.merge([*found.problems, nothing])
    return replace(found, cases=sorted(found.cases, key=lambda case: natural_key(case.case_id)))


_WANTED = {
    "lascarqs": f"train_data/train_<n>/{_LASCARQS_IMAGE}",
    "plain": "files that match images/*.nii.gz or images/*.nii",
    "nnunet": "files that match imagesTr/<case>_0000.nii.gz",
    "synapse": "files that match train_npz/*_slice<number>.npz or test_vol_h5/*.npy.h5",
    "acdc": "folders with an Info.cfg",
    "acdc_slices": "files that match train/*.npz, valid/*.npz or test/*.npz",
    "lge_ecg": "lines in cases.csv",
}


def _classes(root: Path, layout: str, found: Found, targets: Targets | None, label_space: LabelSpace | None) -> Classes:
    """Say what the label values of a layout mean, or of the targets that were chosen in it."""
    if layout in ("lascarqs", "synapse") and targets is not None:
        raise DataError(root, "targets", got=targets, want=f"none: the classes of the {layout} layout are fixed")
    if layout == "lascarqs":
        return Classes(("background", "left atrium"), None, False)
    if layout == "synapse":
        return synapse_classes(root, label_space)
    if targets is not None:
        return chosen_classes(root, targets)
    if layout in ("acdc", "acdc_slices"):
        return acdc_classes()
    if layout == "lge_ecg":
        return scar_classes()
    return found.classes or Classes(("background", "foreground"), {0: 0, 1: 1}, False)


def _lascarqs_folders(root: Path) -> list[Path]:
    above = root / "train_data" if (root / "train_data").is_dir() else root
    return [path for path in above.iterdir() if _LASCARQS_FOLDER.fullmatch(path.name) and path.is_dir()]


def _scan_lascarqs(root: Path) -> Found:
    folders = _lascarqs_folders(root)
    return Found([Case(path.name, path.name, path / _LASCARQS_IMAGE, path / _LASCARQS_LABEL) for path in folders])


def _scan_plain(root: Path) -> Found:
    images, labels = root / "images", root / "labels"
    label_files = dict(nifti_files(labels)) if labels.is_dir() else {}
    cases = []
    for name, path in nifti_files(images) if images.is_dir() else ():
        case_id = name if name in label_files else name.removesuffix(_FIRST_CHANNEL)
        label = label_files.get(case_id, labels / f"{case_id}.nii.gz") if labels.is_dir() else None
        cases.append(Case(case_id, case_id, path, label))
    strangers = sorted(set(label_files) - {case.case_id for case in cases}, key=natural_key) if cases else []
    problems = [
        DataError(label_files[name], "label", got="no image of that name", want=f"images/{name}.nii.gz")
        for name in strangers
    ]
    return Found(cases, problems)


def _with_patients(cases: Sequence[Case], pattern: str | None) -> tuple[list[Case], list[DataError]]:
    """Find the patient in every case's name, if a pattern says how."""
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
