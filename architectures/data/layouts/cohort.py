"""What a cohort is: cases, what their label values mean, and perhaps which of them test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from trifuse.architectures.data.volumes.files import Arrays
from trifuse.architectures.storage.atomic_files import sha256_of
from trifuse.architectures.storage.text import listed
from trifuse.kernels.errors import DataError

MAX_CLASSES = 256
"""So many classes, the background among them, can be told apart: label maps are of 8 bits."""


@dataclass(frozen=True)
class Clinical:
    """What a cohort knows of a case beside its image.

    Attributes:
        ecg: file of its ECG; None if it has none.
        ecg_rate_hz: samples per second of an ECG whose file does not say; None where the file does.
        interval_days: days between the ECG and the image, never negative; None without an ECG.
        rv_anterior, rv_inferior: insertions of the right ventricle into the left one's wall, as indices (x, y) along
            the two in-plane axes of the image's file, in its own axis order; None where nobody marked them.
    """

    ecg: Path | None = None
    ecg_rate_hz: float | None = None
    interval_days: float | None = None
    rv_anterior: tuple[float, float] | None = None
    rv_inferior: tuple[float, float] | None = None


@dataclass(frozen=True)
class Case:
    """One image with its label map, if it has one, and the patient it comes from.

    Attributes:
        case_id: its name, unique in the cohort.
        patient: whose image it is.
        image: the image's file; the first of them if every slice has a file of its own.
        label: the labels' file, which may be the same; None if the case has none.
        arrays: where image and labels lie if they are arrays in NumPy or HDF5 files and not NIfTI volumes.
        other_channels: files of the image's other channels, which are checked but not used.
        frame: which frame of an image of four dimensions it is, counted from 0; None for an image of three.
        clinical: its ECG and landmarks; None in layouts that know of none.
    """

    case_id: str
    patient: str
    image: Path
    label: Path | None
    arrays: Arrays | None = None
    other_channels: tuple[Path, ...] = ()
    clinical: Clinical | None = None
    frame: int | None = None

    @property
    def image_files(self) -> tuple[Path, ...]:
        """All files that hold a part of the image."""
        return (self.image,) if self.arrays is None else self.arrays.files

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case, each once."""
        labels = () if self.label is None else (self.label,)
        ecg = () if self.clinical is None or self.clinical.ecg is None else (self.clinical.ecg,)
        return tuple(dict.fromkeys((*self.image_files, *self.other_channels, *labels, *ecg)))

    @property
    def names_of_frame(self) -> list[str]:
        """What tells its image from other frames of the same file."""
        return [] if self.frame is None else [f"frame {self.frame}"]

    def file_digests(self) -> list[str]:
        """Return the digests of all files of the case, and what says which frame of them it is.

        Raises:
            DataError: a file cannot be read.
        """
        try:
            return [sha256_of(path) for path in self.files] + self.names_of_frame
        except OSError as error:
            want = f"a file of case {self.case_id}"
            raise DataError(error.filename, "file", got=error.strerror, want=want) from error

    def digest(self) -> str:
        """Digest all files of the case, and its frame, in 16 characters.

        Raises:
            DataError: a file cannot be read.
        """
        return sha256(" ".join(self.file_digests()).encode()).hexdigest()[:16]

    def image_digest(self) -> str:
        """Digest all files of the image, and its frame; of one file it is the file's own. Slices may be of equal bytes.

        Raises:
            OSError: a file cannot be read.
        """
        digests = [sha256_of(path) for path in self.image_files] + self.names_of_frame
        return digests[0] if len(digests) == 1 else sha256(" ".join(digests).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """Case ids for training, validation and test; ``unused`` names the cases that are left out on purpose."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cohort:
    """The cases of one folder and what their label values mean.

    Attributes:
        root: the folder.
        layout: the name of its layout, see ``open_cohort``.
        class_names: names of the classes 0, 1, ..., the first being ``"background"``.
        label_map: class of each label value; None makes every value above 0 class 1.
        others_are_background: whether label values that ``label_map`` does not name become background (targets were
            chosen among them) or are an error.
        cases: sorted by name, numbers by value.
        largest_label: between which values the largest label of every case must lie: it tells numberings apart whose
            values mean different things.
        has_spacing: whether the files know the size of a voxel; without it nothing can be measured in mm or mL.
        split: the split that the folder itself prescribes.
        notes: what is odd about the folder, but does not make it unusable.
    """

    root: Path
    layout: str
    class_names: tuple[str, ...]
    label_map: Mapping[int, int] | None
    others_are_background: bool
    cases: tuple[Case, ...]
    largest_label: tuple[int, int] | None = None
    has_spacing: bool = True
    split: Split | None = None
    notes: tuple[str, ...] = ()

    @property
    def ecgs(self) -> list[Path]:
        """The files of the cases' ECGs."""
        found = [case.clinical.ecg for case in self.cases if case.clinical is not None]
        return [path for path in found if path is not None]

    def case(self, case_id: str) -> Case:
        """Return the case of that name.

        Raises:
            DataError: there is none.
        """
        if case_id in self._by_name:
            return self._by_name[case_id]
        raise DataError(self.root, "case", got=repr(case_id), want=f"one of {listed(map(repr, self._by_name))}")

    @cached_property
    def _by_name(self) -> dict[str, Case]:
        return {case.case_id: case for case in self.cases}


def missing_files(cases: Sequence[Case]) -> list[DataError]:
    """Return one error for every file that is not there."""
    problems = []
    for case in cases:
        for path in case.files:
            if not path.is_file():
                ecg = None if case.clinical is None else case.clinical.ecg
                name = "label" if path == case.label else "ECG" if path == ecg else "image"
                got = "a folder" if path.is_dir() else "nothing there"
                problems.append(DataError(path, f"{name} of case {case.case_id}", got=got, want="a file"))
    return problems
