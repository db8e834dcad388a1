"""LAScarQS 2022, task 1: LGE volumes of the left atrium::

    train_data/train_<n>/enhanced.nii.gz          the LGE volume
    train_data/train_<n>/atriumSegImgMO.nii.gz    the left-atrium cavity, anything above 0

The cohort's folder may also be ``train_data`` itself.
"""

from __future__ import annotations

import re
from pathlib import Path

from trifuse.architectures.data.volumes.files import nifti_named

from .cohort import Case
from .found import Classes, Found
from .layout import Layout

_IMAGE, _LABEL = "enhanced", "atriumSegImgMO"
_FOLDER = re.compile(r"train_(\d+)")


def scan_lascarqs(root: Path) -> Found:
    """Find the patients' folders."""
    return Found(
        [
            Case(path.name, path.name, nifti_named(path, _IMAGE), nifti_named(path, _LABEL))
            for path in _patient_folders(root)
        ]
    )


def _patient_folders(root: Path) -> list[Path]:
    above = root / "train_data" if (root / "train_data").is_dir() else root
    return [path for path in above.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]


LAYOUT = Layout(
    name="lascarqs",
    summary="LAScarQS 2022, task 1: LGE volumes of the left atrium",
    signs=f"train_data/train_<n>/{_IMAGE}.nii.gz",
    detect=lambda root: bool(_patient_folders(root)),
    scan=lambda root, values: scan_lascarqs(root),
    lacking=f"train_data/train_<n>/{_IMAGE}.nii.gz",
    classes=lambda root, values: Classes(("background", "left atrium"), None, False),
    takes_targets=False,
)
