"""The Synapse package of TransUNet: slices to train on, whole volumes to test on, and lists that say which::

    train_npz/case0005_slice000.npz   image (H, W) and label (H, W)
    test_vol_h5/case0008.npy.h5       image (D, H, W) and label (D, H, W)
    lists_Synapse/train.txt           names of slices, without their ending (may be absent: then all files count)
    lists_Synapse/test_vol.txt        names of volumes

Its images are clipped to `ABDOMEN_WINDOW_HU` and scaled to [0, 1]; the size of a voxel is lost.

Three numberings of the organs are in circulation. Nothing in a file says which one it was written in, so that is asked
for. Whatever it is, the classes come out in one order, `SYNAPSE_ORGANS`, and go by their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

from trifuse.architectures.data.volumes.files import Arrays
from trifuse.architectures.storage.file_names import composed
from trifuse.architectures.storage.text import listed, natural_key, read_text, repeated
from trifuse.kernels.errors import DataError

from .cohort import Case, Split
from .found import Classes, Found, grouped_slices
from .layout import Export, Layout, Option

LabelSpace = Literal["btcv14", "transunet9", "merit9"]

ABDOMEN_WINDOW_HU = (-125.0, 275.0)
"""Lowest and highest value that the package tells apart."""

SYNAPSE_ORGANS = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
"""The organs in TransUNet's order: classes 1 to 8 of every network trained on this layout."""

_MERIT_ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "pancreas", "liver", "stomach", "aorta")
_BTCV_TO_BACKGROUND = (5, 9, 10, 12, 13)  # esophagus, inferior vena cava, portal and splenic vein, adrenal glands
_BTCV_PANCREAS, _MERIT_PANCREAS = 11, 5

TRAIN_FOLDER, TEST_FOLDER, LIST_FOLDER = "train_npz", "test_vol_h5", "lists_Synapse"
TRAIN_LIST, TEST_LIST = "train.txt", "test_vol.txt"
VOLUME_SUFFIX = ".npy.h5"
_SLICE = re.compile(r"(.+)_slice(\d+)")


def scan_synapse(root: Path) -> Found:
    """Group the slices by case, find the volumes, and compare both with the lists."""
    problems: list[DataError] = []
    notes: list[str] = []
    slices = _chosen(root / TRAIN_FOLDER, ".npz", root / LIST_FOLDER / TRAIN_LIST, problems)
    volumes = _chosen(root / TEST_FOLDER, VOLUME_SUFFIX, root / LIST_FOLDER / TEST_LIST, problems)
    groups = grouped_slices(_numbered(slices, problems), problems, notes)
    train = [Case(name, name, files[0], files[0], Arrays(files, sliced=True)) for name, files in groups.items()]
    test = [Case(name, name, path, path, Arrays((path,))) for name, path in volumes.items()]
    ids = [tuple(sorted((case.case_id for case in cases), key=natural_key)) for cases in (train, test)]
    return Found([*train, *test], problems, has_spacing=False, split=Split(ids[0], (), ids[1]), notes=tuple(notes))


def synapse_classes(root: Path, label_space: LabelSpace | None) -> Classes:
    """Return the class of each label value of a label space.

    Raises:
        DataError: none is given, or one that there is none of.
    """
    if label_space not in get_args(LabelSpace):
        raise DataError(
            root,
            "label_space",
            got=label_space or "none",
            want=f"one of {', '.join(get_args(LabelSpace))}",
            hint="files do not say how organs are numbered: btcv14 are the raw labels 0 to 13, transunet9 begins with "
            "1 aorta, 2 gallbladder, merit9 with 1 spleen, 2 right kidney",
        )
    classes = {name: index for index, name in enumerate(SYNAPSE_ORGANS, start=1)}
    if label_space == "transunet9":
        label_map = {index: index for index in range(9)}
    else:
        label_map = {0: 0, **{value: classes[name] for value, name in enumerate(_MERIT_ORGANS, start=1)}}
    if label_space == "btcv14":
        label_map = _from_btcv(label_map)
    largest = (9, 13) if label_space == "btcv14" else (0, 8)
    return Classes(("background", *SYNAPSE_ORGANS), label_map, False, largest)


def doubted_numbering(voxels: Mapping[str, int]) -> list[str]:
    """Say so if organs are of a size that no abdomen has: TransUNet's and MERIT's numberings use the same values."""
    if voxels["pancreas"] <= voxels["liver"]:
        return []
    sizes = f"the pancreas has {voxels['pancreas']} voxels and the liver {voxels['liver']}"
    return [f"{sizes}: were the labels written in another label_space?"]


def _from_btcv(merit: dict[int, int]) -> dict[int, int]:
    """Put the published remap before the map of MERIT's values: some organs to background, then the pancreas to 5."""
    value_of = {value: value for value in range(14)}
    for before, after in (*((value, 0) for value in _BTCV_TO_BACKGROUND), (_BTCV_PANCREAS, _MERIT_PANCREAS)):
        value_of = {raw: after if value == before else value for raw, value in value_of.items()}
    return {raw: merit[value] for raw, value in value_of.items()}


def _chosen(folder: Path, suffix: str, chosen: Path, problems: list[DataError]) -> dict[str, Path]:
    """Return the files of a folder by name: those of the list if there is one, else all."""
    found = {
        composed(path.name.removesuffix(suffix)): path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if path.name.endswith(suffix) and not path.name.startswith(".")
    }
    if not chosen.is_file():
        return found
    try:
        names = [composed(line.strip()) for line in read_text(chosen).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(chosen, "file", got=error, want="a list of names, one in each line") from error
    want = f"a file {folder.name}/<name>{suffix}"
    if strangers := sorted({name for name in names if name not in found}, key=natural_key):
        problems.append(DataError(chosen, "names", got=f"no file for {listed(strangers)}", want=want))
    if twice := sorted(repeated(names), key=natural_key):
        problems.append(DataError(chosen, "names", got=f"{listed(twice)} more than once", want="each name once"))
    return {name: found[name] for name in names if name in found}


def _numbered(slices: dict[str, Path], problems: list[DataError]) -> Iterator[tuple[str, int, Path]]:
    """Yield case, number and file of every slice whose name tells them."""
    for name, path in slices.items():
        if match := _SLICE.fullmatch(name):
            yield match.group(1), int(match.group(2)), path
        else:
            problems.append(DataError(path, "file name", got=path.name, want="<case>_slice<number>.npz"))


LAYOUT = Layout(
    name="synapse",
    summary="TransUNet's Synapse package: abdominal CT as slices to train on and volumes to test on",
    signs=f"{TRAIN_FOLDER}/ or {TEST_FOLDER}/",
    detect=lambda root: (root / TRAIN_FOLDER).is_dir() or (root / TEST_FOLDER).is_dir(),
    scan=lambda root, values: scan_synapse(root),
    lacking=f"files that match {TRAIN_FOLDER}/*_slice<number>.npz or {TEST_FOLDER}/*{VOLUME_SUFFIX}",
    classes=lambda root, values: synapse_classes(root, values["label_space"]),
    takes_targets=False,
    options=(
        Option(
            "data.label_space",
            "--label-space",
            "how Synapse's labels are numbered",
            {"choices": get_args(LabelSpace)},
        ),
    ),
    check_sizes=doubted_numbering,
    prepared_window_hu=ABDOMEN_WINDOW_HU,
    export=Export(
        options=(
            Option(
                "window",
                "--window",
                "for synapse: clip intensities to LOW..HIGH ({:g} {:g} HU)".format(*ABDOMEN_WINDOW_HU),
                {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")},
            ),
        ),
        note=lambda cohort: "this layout does not keep the size of a voxel; its label space is transunet9",
    ),
)
