"""What a layout finds in a folder: the cases, what is wrong with its files, and what the labels mean."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trifuse.architectures.storage.text import listed
from trifuse.kernels.errors import DataError

from .cohort import Case, Split

Targets = int | Mapping[str, int | Sequence[int]] | Sequence[str]

BACKGROUND, LONE_TARGET = "background", "target"
MEAN_OF_CLASSES = "mean of classes"  # its place in tables of scores is beside those of the classes


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        cases: in any order.
        problems: what is wrong with its files.
        has_spacing: whether they know the size of a voxel.
        split: which cases train, validate and test, if the folder says so.
        notes: what is odd, but no problem.
        classes: what the label values mean, if the folder says so.
        images_unclear: whether a problem leaves open which files are the images.
    """

    cases: list[Case]
    problems: list[DataError] = field(default_factory=list)
    has_spacing: bool = True
    split: Split | None = None
    notes: tuple[str, ...] = ()
    classes: Classes | None = None
    images_unclear: bool = False


class Classes(NamedTuple):
    """What label values mean; see the fields of `Cohort`."""

    names: tuple[str, ...]
    label_map: Mapping[int, int] | None
    others_are_background: bool
    largest_label: tuple[int, int] | None = None


def chosen_classes(root: Path, targets: int | Mapping[str, int | Sequence[int]]) -> Classes:
    """Turn targets into class names and the class of each label value.

    Raises:
        DataError: there is none, one is called the background, or a value is 0 or named twice.
    """
    if isinstance(targets, int):
        targets = {LONE_TARGET: targets}
    if BACKGROUND in targets:
        want = "names of targets: the background is what no target names"
        raise DataError(root, "targets", got=listed(targets), want=want)
    label_map: dict[int, int] = {}
    for index, (name, values) in enumerate(targets.items(), start=1):
        for value in [values] if isinstance(values, int) else values:
            if value == 0 or value in label_map:
                raise DataError(root, f"targets: {name}", got=value, want="label values other than 0, each named once")
            label_map[value] = index
    if not label_map:
        raise DataError(root, "targets", got="none", want="at least one label value")
    return Classes((BACKGROUND, *targets), label_map, True)


def parse_targets(targets: Sequence[str]) -> dict[str, list[int]] | None:
    """Turn ``["lv=3", "wall=1,2"]`` into ``{"lv": [3], "wall": [1, 2]}``; a lone number gets the name "target".

    Raises:
        DataError: a target is not of that form, or two have one name.
    """
    parsed: dict[str, list[int]] = {}
    for target in targets:
        name, _, values = target.rpartition("=")
        name = name or LONE_TARGET
        if name in parsed:
            want = f"one target of each name, such as {name}=1,2 for one of two values, or a=1 and b=2 for two"
            raise DataError(target, "target", got=f"{name!r} twice, in {listed(targets)}", want=want)
        try:
            parsed[name] = [int(value) for value in values.split(",")]
        except ValueError as error:
            raise DataError(target, "target", want="a label value or NAME=VALUE[,VALUE], such as lv=3") from error
    return parsed or None


def by_name(files: Iterable[tuple[str, Path]], problems: list[DataError]) -> dict[str, Path]:
    """Return files by their names; a name that two of them have, their suffixes or accents apart, is a problem."""
    named: dict[str, Path] = {}
    for name, path in files:
        first = named.setdefault(name, path)
        if first is not path:
            hint = "they differ in suffix or in how accents are stored (NFC, NFD): remove one"
            got = f"{first.name} and {path.name}"
            problems.append(DataError(path.parent, f"name {name!r}", got=got, want="one file", hint=hint))
    return named


def grouped_slices(
    slices: Iterable[tuple[str, int, Path]], problems: list[DataError], notes: list[str]
) -> dict[str, tuple[Path, ...]]:
    """Collect the files of every volume in the order of their numbers; a number that comes twice is a problem.

    Args:
        slices: name of the volume, number and file of each slice.
        problems: what is wrong is added here, and
        notes: here what is only odd: gaps between the numbers.
    """
    groups: dict[str, dict[int, Path]] = {}
    for name, number, path in slices:
        first = groups.setdefault(name, {}).setdefault(number, path)
        if first is not path:
            got = f"{first.name} and {path.name}"
            problems.append(DataError(path.parent, f"slice {number} of {name}", got=got, want="one file"))
    for name, files in groups.items():
        numbers = sorted(files)
        gaps = [(one + 1, other - 1) for one, other in itertools.pairwise(numbers) if other - one > 1]
        if gaps:
            absent = listed(str(first) if first == last else f"{first} to {last}" for first, last in gaps)
            notes.append(f"{name}: between slices {numbers[0]} and {numbers[-1]} there is no slice {absent}")
    return {name: tuple(files[number] for number in sorted(files)) for name, files in groups.items()}
