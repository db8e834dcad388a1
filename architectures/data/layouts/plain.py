"""The plainest layout: a folder of images and, beside it, one of labels::

images/<case>.nii.gz    or <case>_0000.nii.gz, as nnU-Net names the first channel
labels/<case>.nii.gz    the folder may be absent: such a cohort can be predicted, not trained on
"""

from __future__ import annotations

from pathlib import Path

from trifuse.architectures.data.volumes.files import nifti_files
from trifuse.architectures.storage.text import natural_key
from trifuse.kernels.errors import DataError

from .cohort import Case
from .found import Found, by_name
from .layout import Layout

_FIRST_CHANNEL = "_0000"


def scan_plain(root: Path) -> Found:
    """Pair images and labels by their names; labels without an image are a problem."""
    images, labels = root / "images", root / "labels"
    problems: list[DataError] = []
    label_files = by_name(nifti_files(labels) if labels.is_dir() else (), problems)
    cases = []
    for name, path in by_name(nifti_files(images) if images.is_dir() else (), problems).items():
        case_id = name if name in label_files else name.removesuffix(_FIRST_CHANNEL)
        label = label_files.get(case_id, labels / f"{case_id}.nii.gz") if labels.is_dir() else None
        cases.append(Case(case_id, case_id, path, label))
    strangers = sorted(set(label_files) - {case.case_id for case in cases}, key=natural_key) if cases else []
    problems += [
        DataError(label_files[name], "label", got="no image of that name", want=f"images/{name}.nii.gz")
        for name in strangers
    ]
    return Found(cases, problems)


LAYOUT = Layout(
    name="plain",
    summary="a folder of images and one of labels",
    signs="images/*.nii.gz",
    detect=lambda root: (root / "images").is_dir(),
    scan=lambda root, values: scan_plain(root),
    lacking="files that match images/*.nii.gz or images/*.nii",
)
