"""The plainest layout: a folder of images and, beside it, one of labels::

images/<case>.nii.gz    or <case>_0000.nii.gz, as nnU-Net names the first channel
labels/<case>.nii.gz    the folder may be absent: such a cohort can be predicted, not trained on

A case has one image: of several channels none can be chosen here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trifuse.architectures.data.volumes.files import nifti_files, unread_images
from trifuse.architectures.storage.text import natural_key
from trifuse.kernels.errors import DataError

from .channels import cases_of_images
from .found import Found, by_name
from .layout import Layout


def scan_plain(root: Path) -> Found:
    """Pair images and labels by their names; labels without an image are a problem."""
    images, labels = root / "images", root / "labels"
    of_images = unread_images(images) if images.is_dir() else []
    problems = unread_images(labels) if labels.is_dir() else []
    label_files = by_name(nifti_files(labels) if labels.is_dir() else (), problems)
    image_files = by_name(nifti_files(images) if images.is_dir() else (), of_images)
    cases = cases_of_images(images, image_files, of_images, channel="", whole=label_files)
    if labels.is_dir():
        cases = [
            replace(case, label=label_files.get(case.case_id, labels / f"{case.case_id}.nii.gz")) for case in cases
        ]
    strangers = sorted(set(label_files) - {case.case_id for case in cases}, key=natural_key) if cases else []
    problems += [
        DataError(label_files[name], "label", got="no image of that name", want=f"images/{name}.nii.gz")
        for name in strangers
    ]
    return Found(cases, of_images + problems, images_unclear=bool(of_images))


LAYOUT = Layout(
    name="plain",
    summary="a folder of images and one of labels",
    signs="images/*.nii.gz",
    detect=lambda root: (root / "images").is_dir(),
    scan=lambda root, values: scan_plain(root),
    lacking="files that match images/*.nii.gz or images/*.nii",
)
