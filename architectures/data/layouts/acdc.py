"""Cardiac cine in ACDC's raw layout; every folder with an ``Info.cfg`` is a patient, ``training/`` may stand above::

patient001/Info.cfg                       ED: 1, ES: 12: which frames are labelled
patient001/patient001_frame01.nii.gz      the image of a frame, counted from 1
patient001/patient001_frame01_gt.nii.gz   its labels: 1 RV cavity, 2 myocardium, 3 LV cavity
patient001/patient001_4d.nii.gz           the whole cycle, not used
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from trifuse.architectures.storage.text import read_text
from trifuse.kernels.errors import DataError

from .cohort import Case
from .found import Classes, Found
from .layout import Layout, Option

Frames = Literal["both", "ed", "es"]

ACDC_CLASSES = ("RV", "MYO", "LV")
"""Names of the labels 1, 2 and 3."""

INFO_FILE = "Info.cfg"
_PHASES = {"both": ("ED", "ES"), "ed": ("ED",), "es": ("ES",)}


def patient_folders(root: Path) -> list[Path]:
    """Return the folders that hold an ``Info.cfg``."""
    above = root / "training" if (root / "training").is_dir() else root
    return sorted(path.parent for path in above.glob(f"*/{INFO_FILE}"))


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
        lines = read_text(path, errors="replace").splitlines()
    except OSError as error:
        raise DataError(path, "file", got=error.strerror, want=f"the phases of patient {folder.name}") from error
    stated = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    numbers = {name: int(value) for name in ("ED", "ES") if (value := stated.get(name, "")).isdecimal()}
    if len(numbers) < 2 or 0 in numbers.values():
        got = ", ".join(f"{name}: {stated.get(name, 'nothing')}" for name in ("ED", "ES"))
        want = "ED: <frame> and ES: <frame>, counted from 1"
        raise DataError(path, f"phases of patient {folder.name}", got=got, want=want)
    return numbers


LAYOUT = Layout(
    name="acdc",
    summary="ACDC's folders of patients: cardiac cine, end of diastole and of systole labelled",
    signs=f"*/{INFO_FILE}",
    detect=lambda root: bool(patient_folders(root)),
    scan=lambda root, values: scan_acdc(root, values["frames"]),
    lacking=f"folders with an {INFO_FILE}",
    classes=lambda root, values: acdc_classes(),
    options=(
        Option("data.frames", "--frames", "of ACDC's raw layout (both)", {"choices": tuple(_PHASES)}, default="both"),
    ),
)
