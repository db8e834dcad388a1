"""What finding the cases of a folder gives, whatever its layout: the cases, what is wrong, and what the labels mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

from trifuse.kernels.errors import DataError

from .cohort import Case, Split, listed

LabelSpace = Literal["btcv14", "transunet9", "merit9"]
Frames = Literal["both", "ed", "es"]
Targets = int | Mapping[str, int | Sequence[int]]


class CohortOptions(TypedDict, total=False):
    """What else ``open_cohort`` can be told about a folder; see there."""

    patient_pattern: str | None
    label_space: LabelSpace | None
    frames: Frames
    channel: str | None
    max_interval_days: float | None


@dataclass(frozen=True)
class Found:
    """The cases of a folder in any order, what is wrong with its files, and what the folder itself knows or lacks."""

    cases: list[Case]
    problems: list[DataError] = field(default_factory=list)
    has_spacing: bool = True
    split: Split | None = None
    notes: tuple[str, ...] = ()
    classes: Classes | None = None


class Classes(NamedTuple):
    """What label values mean; see the fields of `Cohort`."""

    names: tuple[str, ...]
    label_map: Mapping[int, int] | None
    others_are_background: bool
    largest_label: tuple[int, int] | None = None


def chosen_classes(root: Path, targets: Targets) -> Classes:
    """Turn targets into class names and the class of each label value.

    Raises:
        DataError: there is none, or a value is 0 or named twice.
    """
    if isinstance(targets, int):
        targets = {"target": targets}
    label_map: dict[int, int] = {}
    for index, (name, values) in enumerate(targets.items(), start=1):
        for value in [values] if isinstance(values, int) else values:
            if value == 0 or value in label_map:
                raise DataError(root, f"targets: {name}", got=value, want="label values other than 0, each named once")
            label_map[value] = index
    if not label_map:
        raise DataError(root, "targets", got="none", want="at least one label value")
    return Classes(("background", *targets), label_map, True)


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
        if gaps := sorted(set(range(min(files), max(files))) - set(files)):
            notes.append(f"{name}: between slices {min(files)} and {max(files)} there is no slice {listed(gaps)}")
    return {name: tuple(files[number] for number in sorted(files)) for name, files in groups.items()}
