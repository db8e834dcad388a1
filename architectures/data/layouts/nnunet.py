"""nnU-Net's raw data sets::

    dataset.json                        channels, labels, number of cases, ending of the files
    imagesTr/<case>_0000.nii.gz         the first channel of a case to train on, _0001 the second
    labelsTr/<case>.nii.gz              its labels
    imagesTs/<case>_0000.nii.gz         cases to test on; those with a file in
    labelsTs/<case>.nii.gz              are cases of the cohort, never trained on

The networks here see one channel: of several, one is chosen by its name or number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trifuse.architectures.data.volumes.files import IMAGE_SUFFIXES
from trifuse.architectures.storage.file_names import composed
from trifuse.architectures.storage.text import count, listed, natural_key
from trifuse.kernels.errors import DataError

from .channels import case_and_channel, channel_number
from .cohort import Case, Cohort, Split
from .found import Classes, Found, by_name
from .layout import Export, Layout, Option
from .nnunet_json import DESCRIPTION_FILE, Description, read_description

if TYPE_CHECKING:
    from trifuse.architectures.data.volumes.volume import Volume

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = "imagesTr", "labelsTr", "imagesTs", "labelsTs"


class _Files(NamedTuple):
    """The files of a case: its images by the number of their channel, and its labels."""

    images: Mapping[int, Path]
    label: Path


def scan_nnunet(root: Path, channel: str | None) -> Found:
    """Find the cases of a data set, and everything that is wrong with its names and its description.

    Args:
        root: the folder.
        channel: name or number of the channel to use where there are several.
    """
    described = read_description(root)
    problems = described.problems
    train = _listed_files(described) if described.cases is not None else _files(root, described, TRAIN_IMAGES)
    test = _files(root, described, TEST_IMAGES) if (root / TEST_LABELS).is_dir() else {}
    if described.count is not None and described.count != len(train):
        described.refuse("numTraining", f"{described.count}, but {count(len(train), 'case')}", "the number of cases")
    number = _channel_number(described, channel)
    for name, files in {**train, **test}.items():
        _refuse_wrong_channels(described, name, files)
    cases = [_case(name, files, number or 0) for name, files in {**test, **train}.items() if files.images]
    for name in sorted(set(train) & set(test), key=natural_key):
        problems.append(DataError(root, f"case {name}", got=f"{TRAIN_IMAGES} and {TEST_IMAGES}", want="one of them"))
    ids = [tuple(sorted(names, key=natural_key)) for names in (train, test)]
    split = Split(ids[0], (), ids[1]) if test else None
    return Found(
        cases,
        problems,
        split=split,
        notes=tuple(described.notes),
        classes=_classes(described),
        images_unclear=any(case.other_channels for case in cases) if channel is None else number is None,
    )


def _classes(described: Description) -> Classes:
    """Return the classes that the labels name, in the order of their values."""
    labels = described.labels
    if labels is None:  # a fault that is reported: any label will do until it is fixed
        return Classes(("background", "foreground"), None, False)
    return Classes(tuple(labels), {value: value for value in labels.values()}, False)


def _files(root: Path, described: Description, folder: str) -> dict[str, _Files]:
    """Pair the files of an image folder with those of its labels, by their names."""
    labels_folder = root / folder.replace("images", "labels")
    images: dict[str, dict[int, Path]] = {}
    for name, path in by_name(_names(root / folder, described), described.problems).items():
        if parts := case_and_channel(name):
            images.setdefault(parts[0], {})[parts[1]] = path
        else:
            want = f"<case>_0000{described.file_ending}"
            described.problems.append(DataError(path, "file name", got=path.name, want=want))
    labels = by_name(_names(labels_folder, described), described.problems)
    for name in sorted(set(labels) - set(images), key=natural_key):
        want = f"{folder}/{name}_0000{described.file_ending}"
        described.problems.append(DataError(labels[name], "label", got="no image of that name", want=want))
    if folder == TEST_IMAGES:
        left = sorted(set(images) - set(labels), key=natural_key)
        described.notes += [f"{folder}: no labels for {listed(left)}: not part of the cohort"] if left else []
        images = {name: files for name, files in images.items() if name in labels}
    ending = described.file_ending
    return {name: _Files(files, labels.get(name, labels_folder / f"{name}{ending}")) for name, files in images.items()}


def _names(folder: Path, described: Description) -> list[tuple[str, Path]]:
    """List the files of a folder with the right ending.

    Images of another ending are faults; what no ending of an image tells, such as sidecars and what systems leave
    behind, is left out with a note, and hidden files without one.
    """
    if not folder.is_dir():
        described.problems.append(DataError(folder, "folder", got="nothing there", want="a folder of files"))
        return []
    named, strangers = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # what macOS leaves beside files has their endings, too
            continue
        if path.name.endswith(described.file_ending):
            named.append((composed(path.name.removesuffix(described.file_ending)), path))
        elif not path.name.lower().endswith(IMAGE_SUFFIXES):
            strangers.append(path.name)
        else:
            want = f"{described.file_ending}, by {DESCRIPTION_FILE}"
            described.problems.append(DataError(path, "file ending", got=path.name, want=want))
    if strangers:
        described.notes.append(
            f"{folder.name}: {count(len(strangers), 'file')} left out that no image is: {listed(strangers)}"
        )
    return named


def _listed_files(described: Description) -> dict[str, _Files]:
    """Return the files that ``dataset.json`` lists."""
    cases = described.cases or {}
    for listing in cases.values():
        for path in (*listing.images, listing.label):
            if not path.name.endswith(described.file_ending):
                want = f"{described.file_ending}, by {DESCRIPTION_FILE}"
                described.problems.append(DataError(path, "file ending", got=path.name, want=want))
    return {name: _Files(dict(enumerate(listing.images)), listing.label) for name, listing in cases.items()}


def _channel_number(described: Description, channel: str | None) -> int | None:
    """Return the number of the channel to use; None, with a fault, where it is unclear."""
    names = described.channels or ("the only one",)
    if channel is not None:
        try:
            return channel_number(channel, names, described.path)
        except DataError as error:
            described.problems.append(error)
            return None
    if len(names) > 1:
        hint = "the networks see one: choose it with channel=NAME"
        described.refuse("channel_names", f"{len(names)} channels: {listed(names)}", "one channel", hint)
        return None
    return 0


def _refuse_wrong_channels(described: Description, name: str, files: _Files) -> None:
    """Refuse a case that lacks a channel or has too many."""
    if described.channels is None:
        return
    wanted = set(range(len(described.channels)))
    if set(files.images) != wanted:
        got, want = ([f"{number:04d}" for number in sorted(numbers)] for numbers in (files.images, wanted))
        described.problems.append(
            DataError(described.path, f"channels of case {name}", got=listed(got), want=listed(want))
        )


def _case(name: str, files: _Files, number: int) -> Case:
    image = files.images.get(number) or files.images[min(files.images)]
    others = tuple(path for _, path in sorted(files.images.items()) if path != image)
    return Case(name, name, image, files.label, other_channels=others)


def _check_case(case: Case, image: Volume, labels: Volume | None) -> tuple[list[DataError], list[str]]:
    from .nnunet_grids import compare_with_nnunet  # reads voxels, which the parser of the command has no use for

    return compare_with_nnunet(case, image, labels)


def _note(cohort: Cohort) -> str:
    return "" if cohort.has_spacing else "the cohort does not know the size of a voxel; 1 x 1 x 1 was written"


LAYOUT = Layout(
    name="nnunet",
    summary="nnU-Net's raw data set",
    signs=f"{DESCRIPTION_FILE} or {TRAIN_IMAGES}/",
    detect=lambda root: (root / DESCRIPTION_FILE).is_file() or (root / TRAIN_IMAGES).is_dir(),
    scan=lambda root, values: scan_nnunet(root, values["channel"]),
    lacking=f"files that match {TRAIN_IMAGES}/<case>_0000.nii.gz",
    options=(
        Option(
            "data.channel",
            "--channel",
            "name or number of the channel of an nnU-Net data set that has several",
            tells_images=True,
        ),
    ),
    check_case=_check_case,
    export=Export(
        options=(
            Option("channel_name", "--channel-name", "for nnunet: what the images show, such as CT", default="image"),
        ),
        note=_note,
    ),
)
