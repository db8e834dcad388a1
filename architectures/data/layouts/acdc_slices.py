"""Cardiac cine of ACDC as slices that others made of it::

train/<slice>.npz and valid/<slice>.npz   img (H, W) and label (H, W)
test/<volume>.npz                         img (D, H, W) and label (D, H, W)
"""

from __future__ import annotations

import re
from pathlib import Path

from trifuse.architectures.data.volumes.files import Arrays
from trifuse.architectures.storage.text import natural_key
from trifuse.kernels.errors import DataError

from .acdc import acdc_classes
from .cohort import Case, Split
from .found import Found, grouped_slices
from .layout import Layout

_PARTS = ("train", "valid", "test")
_SLICE = re.compile(r"(?P<volume>.+?)_?slice_?(?P<phase>[A-Za-z]*)_?(?P<number>\d+)")
_VOLUME = re.compile(r"(?P<volume>.+?)_volume_?(?P<phase>[A-Za-z]*)")
_PATIENT = re.compile(r"(?:case|patient)[_-]?\d+", re.IGNORECASE)


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


LAYOUT = Layout(
    name="acdc_slices",
    summary="slices and volumes made of ACDC, as NumPy files",
    signs="train/*.npz",
    detect=lambda root: any(_prepared(root / part) for part in _PARTS),
    scan=lambda root, values: scan_acdc_slices(root),
    lacking="files that match train/*.npz, valid/*.npz or test/*.npz",
    classes=lambda root, values: acdc_classes(),
)
