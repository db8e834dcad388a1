"""Cardiac cine cohorts in the layouts of ACDC: the raw folders of patients, and slices that others made of them.

``acdc``, the raw folders (every folder with an ``Info.cfg`` is a patient; ``training/`` may stand above them)::

    patient001/Info.cfg                       ED: 1, ES: 12: which frames are labelled
    patient001/patient001_frame01.nii.gz      the image of a frame, counted from 1
    patient001/patient001_frame01_gt.nii.gz   its labels: 1 RV cavity, 2 myocardium, 3 LV cavity
    patient001/patient001_4d.nii.gz           the whole cycle, not used

``acdc_slices``, the prepared arrays::

    train/<slice>.npz and valid/<slice>.npz   img (H, W) and label (H, W)
    test/<volume>.npz                         img (D, H, W) and label (D, H, W)
"""

from __future__ import annotations

import re
from pathlib import Path

from trifuse.architectures.data.volumes.arrays import Arrays
from trifuse.kernels.errors import DataError

from .cohort import Case, Split, natural_key
from .found import Classes, Found, Frames, grouped_slices

ACDC_CLASSES = ("RV", "MYO", "LV")
"""Names of the labels 1, 2 and 3."""

INFO_FILE = "Info.cfg"
_PHASES = {"both": ("ED", "ES"), "ed": ("ED",), "es": ("ES",)}
_PARTS = ("train", "valid", "test")
_SLICE = re.compile(r"(?P<volume>.+?)_?slice_?(?P<phase>[A-Za-z]*)_?(?P<number>\d+)")
_VOLUME = re.compile(r"(?P<volume>.+?)_volume_?(?P<phase>[A-Za-z]*)")
_PATIENT = re.compile(r"(?:case|patient)[_-]?\d+", re.IGNORECASE)


def patient_folders(root: Path) -> list[Path]:
    """Return the folders that hold an ``Info.cfg``."""
    above = root / "training" if (root / "training").is_dir() else root
    return sorted(path.parent for path in above.glob(f"*/{INFO_FILE}"))


def has_acdc_slices(root: Path) -> bool:
    """Tell whether a folder holds prepared arrays."""
    return any(_prepared(root / part) for part in _PARTS)


def acdc_classes() -> Classes:
    """Return right ventricle, myocardium and left ventricle."""
    return Classes(("background", *ACDC_CLASSES), {value: value for value in range(4)}, False)


def scan_acdc(root: Path, frames: Frames) -> Found:
    """Find the labelled frames of every patient."""
    cases: list[Case] = []
    problems: list[DataError] = []
    for folder in patient_folders(root):
        try:
            numbers = read_phases(folder)
        except DataError as error:
            problems.append(error)
            continue
        for phase in _PHASES[frames]:
            name = f"{folder.name}_frame{numbers[phase]:02d}"
            cases.append(Case(name, folder.name, folder / f"{name}.nii.gz", folder / f"{name}_gt.nii.gz"))
    return Found(cases, problems)


def read_phases(folder: Path) -> dict[str, int]:
    """Read which frames show the end of diastole and of systole, counted from 1.

    Raises:
        DataError: the file does not say so; it names the patient.
    """
    path = folder / INFO_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(path, "file", got=error.strerror, want=f"the phases of patient {folder.name}") from error
    stated = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    numbers = {name: int(value) for name in ("ED", "ES") if (value := stated.get(name, "")).isdecimal()}
    if len(numbers) < 2 or 0 in numbers.values():
        got = ", ".join(f"{name}: {stated.get(name, 'nothing')}" for name in ("ED", "ES"))
        want = "ED: <frame> and ES: <frame>, counted from 1"
        raise DataError(path, f"phases of patient {folder.name}", got=got, want=want)
    return numbers


def scan_acdc_slices(root: Path) -> Found:
    """Group the slices to train and validate on by volume, and find the volumes to test on."""
    problems: list[DataError] = []
    notes: list[str] = []
    parts = [
        *(_sliced(root / part, problems, notes) for part in ("train", "valid")),
        [_case(_volume_name(path), (path,)) for path in _prepared(root / "test")],
    ]
    ids = [tuple(sorted((case.case_id for case in cases), key=natural_key)) for cases in parts]
    cases = [case for part in parts for case in part]
    return Found(cases, problems, has_spacing=False, split=Split(*ids), notes=tuple(notes))


def _prepared(folder: Path) -> list[Path]:
    """Return the arrays of a folder that may be absent; hidden files are left out."""
    return sorted(path for path in folder.glob("*.npz") if not path.name.startswith("."))


def _sliced(folder: Path, problems: list[DataError], notes: list[str]) -> list[Case]:
    """Make cases of the slices of a folder."""
    numbered = []
    for path in _prepared(folder):
        if match := _SLICE.fullmatch(path.stem):
            numbered.append(("_".join(filter(None, match.group("volume", "phase"))), int(match["number"]), path))
        else:
            problems.append(DataError(path, "file name", got=path.name, want="<volume>_slice_<number>.npz"))
    groups = grouped_slices(numbered, problems, notes)
    return [_case(name, files, sliced=True) for name, files in groups.items()]


def _volume_name(path: Path) -> str:
    match = _VOLUME.fullmatch(path.stem)
    return "_".join(filter(None, match.group("volume", "phase"))) if match else path.stem


def _case(name: str, files: tuple[Path, ...], *, sliced: bool = False) -> Case:
    patient = _PATIENT.match(name)
    arrays = Arrays(files, image_key="img", sliced=sliced)
    return Case(name, patient.group() if patient else name, files[0], files[0], arrays)
