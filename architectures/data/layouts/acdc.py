"""Cardiac cine in ACDC's raw layout; every folder with an ``Info.cfg`` is a patient::

patient001/Info.cfg                       ED: 1, ES: 12: which frames are labelled
patient001/patient001_frame01.nii.gz      the image of a frame, counted from 1
patient001/patient001_frame01_gt.nii.gz   its labels: 1 RV cavity, 2 myocardium, 3 LV cavity
patient001/patient001_4d.nii.gz           the whole cycle, not used

Folders such as ``database/training/`` may stand above, and the images may be unpacked, ``.nii``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from trifuse.architectures.data.volumes.files import nifti_named
from trifuse.architectures.storage.text import count, listed, read_text
from trifuse.kernels.errors import DataError

from .cohort import Case
from .found import Classes, Found
from .layout import Layout, Option

Frames = Literal["both", "ed", "es"]

ACDC_CLASSES = ("RV", "MYO", "LV")
"""Names of the labels 1, 2 and 3."""

INFO_FILE = "Info.cfg"
_INFO = "[Ii]nfo.cfg"
_TRAINING = "training"
_FRAME = re.compile("[0-9]{1,6}")
_DEEPEST = 3
"""So many folders down patients are looked for: ``database/training/patient001``."""

_PHASES = {"both": ("ED", "ES"), "ed": ("ED",), "es": ("ES",)}


def patient_folders(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders that hold an ``Info.cfg``, and those of them that are not part of the cohort.

    Patients below a folder ``training`` are the cohort if there are any; else those that lie nearest to the root.
    """
    levels = [sorted(path.parent for path in root.glob("*/" * level + _INFO)) for level in range(1, _DEEPEST + 1)]
    everyone = [folder for folders in levels for folder in folders]
    train = [folder for folder in everyone if _TRAINING in folder.relative_to(root).parts[:-1]]
    chosen = train or next(filter(None, levels), [])
    return chosen, [folder for folder in everyone if folder not in set(chosen)]


def acdc_classes() -> Classes:
    """Return right ventricle, myocardium and left ventricle."""
    return Classes(("background", *ACDC_CLASSES), {value: value for value in range(4)}, False)


def scan_acdc(root: Path, frames: Frames) -> Found:
    """Find the labelled frames of every patient."""
    cases: list[Case] = []
    problems: list[DataError] = []
    folders, left = patient_folders(root)
    for folder in folders:
        try:
            numbers = read_phases(folder)
        except DataError as error:
            problems.append(error)
            continue
        for phase in _PHASES[frames]:
            name = f"{folder.name}_frame{numbers[phase]:02d}"
            cases.append(Case(name, folder.name, nifti_named(folder, name), nifti_named(folder, f"{name}_gt")))
    parents = sorted({str(folder.parent.relative_to(root)) for folder in left})
    notes = (f"{count(len(left), 'patient')} not part of the cohort, in {listed(parents)}",) if left else ()
    return Found(cases, problems, notes=notes)


def read_phases(folder: Path) -> dict[str, int]:
    """Read which frames show the end of diastole and of systole, counted from 1.

    Raises:
        DataError: the file does not say so; it names the patient.
    """
    path = next(folder.glob(_INFO), folder / INFO_FILE)
    try:
        lines = read_text(path, errors="replace").splitlines()
    except OSError as error:
        raise DataError(path, "file", got=error.strerror, want=f"the phases of patient {folder.name}") from error
    stated = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    numbers = {name: int(value) for name in ("ED", "ES") if _FRAME.fullmatch(value := stated.get(name, ""))}
    if len(numbers) < 2 or 0 in numbers.values():
        got = ", ".join(f"{name}: {stated.get(name, 'nothing')}" for name in ("ED", "ES"))
        want = "ED: <frame> and ES: <frame>, counted from 1"
        raise DataError(path, f"phases of patient {folder.name}", got=got, want=want)
    return numbers


LAYOUT = Layout(
    name="acdc",
    summary="ACDC's folders of patients: cardiac cine, end of diastole and of systole labelled",
    signs=f"*/{INFO_FILE}",
    detect=lambda root: any(patient_folders(root)),
    scan=lambda root, values: scan_acdc(root, values["frames"]),
    lacking=f"folders with an {INFO_FILE}",
    classes=lambda root, values: acdc_classes(),
    options=(
        Option("data.frames", "--frames", "of ACDC's raw layout (both)", {"choices": tuple(_PHASES)}, default="both"),
    ),
)
