"""Everything that is wrong with a cohort, found before anything is trained on it, and reported at once."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from trifuse.architectures.data.ecg.median_beat import load_beat
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.architectures.storage.atomic_files import sha256_of, write_json
from trifuse.architectures.storage.text import count, listed, parse_json, read_parsed
from trifuse.kernels.errors import DataError

from .cohort import Case, Cohort, missing_files
from .cohort_options import AUTO
from .found import Targets
from .layout import Layout
from .open_cohort import layout_of, scan_cohort
from .read_case import load_raw_case, map_labels
from .split import verify_split


@dataclass(frozen=True)
class Findings:
    """What was found: the cohort as it stands, errors that forbid using it, and warnings that do not."""

    cohort: Cohort
    errors: tuple[DataError, ...]
    warnings: tuple[str, ...]

    def told_warnings(self) -> list[str]:
        """Return the warnings, but once what was found in several files: their number, and which they are."""
        root = self.cohort.root
        of_text: dict[str, tuple[str, list[str]]] = {}
        for warning in self.warnings:
            where, _, text = warning.removeprefix(f"{root}/").partition(": ")
            of_text.setdefault(text or warning, (warning, []))[1].append(where)
        return [
            f"{root}: {text}: {count(len(files), 'file')}: {listed(files)}" if len(files) > 1 else first
            for text, (first, files) in of_text.items()
        ]


def check_folder(
    root: Path,
    layout: str = AUTO,
    targets: Targets | None = None,
    *,
    digests: Path | None = None,
    **options: Any,
) -> Findings:
    """Check the cohort in a folder; arguments as for ``open_cohort`` and ``check_cohort``.

    Missing files and colliding names do not end the check: what can be read is read.

    Raises:
        DataError: there is no case at all.
    """
    cohort, problems = scan_cohort(root, layout, targets, **options)
    findings = check_cohort(cohort, digests=digests)
    known = {str(error) for error in problems}
    further = [error for error in findings.errors if str(error) not in known]
    if not problems and cohort.split is not None and cohort.split.train:
        try:
            verify_split(cohort, cohort.split)
        except DataError as error:
            further.append(error)
    return Findings(cohort, (*problems, *further), findings.warnings)


def check_cohort(cohort: Cohort, *, digests: Path | None = None) -> Findings:
    """Read every file of a cohort to its last byte and return all errors and warnings.

    Args:
        cohort: the cases.
        digests: JSON file with the SHA-256 of every file. If it is there, the files are compared with it; if not, it
            is written, provided that the cohort has no error. It is the only way to notice a changed byte in an
            uncompressed file.
    """
    notes = [f"{cohort.root}: {note}" for note in cohort.notes]
    found = _Collected(cohort, layout_of(cohort.root, cohort.layout), missing_files(cohort.cases), notes)
    for case in cohort.cases:
        if not missing_files([case]):
            for check in (found.check_images, found.check_ecg):
                try:
                    check(case)
                except DataError as error:
                    found.errors.append(error)
    found.check_classes()
    if digests is not None:
        _compare_digests(cohort, Path(digests), found.errors, found.warnings)
    return Findings(cohort, tuple(found.errors), tuple(found.warnings))


@dataclass
class _Collected:
    """What was found so far.

    Attributes:
        cohort, layout: what is checked.
        errors, warnings: what was found.
        contents: the first case with such voxels, or such a beat, by their digest.
        classes, background: in how many cases a class, and a label value that is no target, occurs.
        sizes: how many voxels a class has in all cases.
        planes: the cases whose slices lie in a plane of the body.
    """

    cohort: Cohort
    layout: Layout
    errors: list[DataError]
    warnings: list[str]
    contents: dict[str, Case] = field(default_factory=dict)
    classes: Counter[int] = field(default_factory=Counter)
    background: Counter[int] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    planes: dict[str, list[str]] = field(default_factory=dict)

    def check_images(self, case: Case) -> None:
        """Read the image and the labels of a case; raises what makes them unusable."""
        image, raw = load_raw_case(case)
        self.warnings += _notes(image) + ([] if raw is None else _notes(raw))
        self.planes.setdefault(image.geometry.plane, []).append(case.case_id)
        self._compare(case, case.image, "image", "voxels", image.voxels)
        if self.layout.check_case is not None:
            errors, warnings = self.layout.check_case(case, image, raw)
            self.errors += errors
            self.warnings += warnings
        if raw is None:
            return
        labels = map_labels(self.cohort, raw)
        counts = np.bincount(labels.voxels.ravel(), minlength=len(self.cohort.class_names)).tolist()
        present = [index for index, count in enumerate(counts) if index and count]
        self.classes.update(present)
        self.sizes.update(dict(zip(self.cohort.class_names, counts, strict=True)))
        if not present:
            self.warnings.append(f"{raw.path}: labels: empty mask, no voxel of any target")
        if self.cohort.others_are_background and self.cohort.label_map is not None:
            self.background.update(set(np.unique(raw.voxels).tolist()) - {0, *self.cohort.label_map})

    def check_ecg(self, case: Case) -> None:
        """Read the ECG of a case, if it has one, down to a beat; raises what makes it unusable."""
        if case.clinical is None or case.clinical.ecg is None:
            return
        beat = load_beat(case.clinical.ecg, rate_hz=case.clinical.ecg_rate_hz)
        self.warnings += [f"{case.clinical.ecg}: ECG: {note}" for note in beat.notes]
        self._compare(case, case.clinical.ecg, "ECG", "beat", beat.signal_mv)

    def _compare(self, case: Case, path: Path, what: str, content: str, values: np.ndarray) -> None:
        """Compare what was read of a case with that of the cases before."""
        first = self.contents.setdefault(f"{what} {hashlib.sha256(values.tobytes()).hexdigest()}", case)
        if first is case:
            return
        text = f"{case.case_id} and {first.case_id} have the same {content}"
        if first.patient == case.patient:
            self.warnings.append(text)
        else:
            hint = "if they were split apart, the test set would leak into training"
            self.errors.append(DataError(path, what, got=text, want=f"{what}s that differ", hint=hint))

    def check_classes(self) -> None:
        """Compare the classes of the cohort with those of its cases."""
        cohort = self.cohort
        *few, most = sorted(self.planes, key=lambda plane: len(self.planes[plane])) or ("",)
        for plane in few:
            text = f"slices are {plane} in {listed(self.planes[plane])}, and {most} in most cases"
            self.warnings.append(f"{cohort.root}: {text}; a network that learns the one does not know the other")
        for value, cases in sorted(self.background.items()):
            text = f"label value {value} is no target and becomes background in {count(cases, 'case')}"
            self.warnings.append(f"{cohort.root}: {text}")
        self.warnings += [f"{cohort.root}: {doubt}" for doubt in self.layout.check_sizes(self.sizes)]
        labelled = sum(case.label is not None for case in cohort.cases)
        if not labelled or self.errors:
            return
        for index, name in enumerate(cohort.class_names):
            if index and not self.classes[index]:
                want = "at least one case that shows it"
                self.errors.append(
                    DataError(cohort.root, f"class {name!r}", got=f"none of {count(labelled, 'case')}", want=want)
                )


def _notes(volume: Volume) -> list[str]:
    return [f"{volume.path}: {note.field}: {note.text}" for note in volume.notes]


def _compare_digests(cohort: Cohort, manifest: Path, errors: list[DataError], warnings: list[str]) -> None:
    """Compare the cohort's files with a manifest, or write one."""
    paths = [path for case in cohort.cases for path in case.files if path.is_file()]
    found = {path.relative_to(cohort.root).as_posix(): sha256_of(path) for path in paths}
    if not manifest.exists():
        if not errors:
            write_json(manifest, {"format": "trifuse digests", "schema_version": 1, "sha256": found})
        return
    try:
        recorded = read_parsed(manifest, parse_json)["sha256"]
        recorded = {str(name): str(digest) for name, digest in recorded.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        errors.append(DataError(manifest, "digests", got=repr(error), want='JSON with "sha256": {file: digest}'))
        return
    for name, digest in recorded.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            errors.append(DataError(manifest, "digests", got=name, want="files below the cohort's folder"))
        elif name not in found:
            errors.append(DataError(cohort.root / name, "digest", got="no such file in the cohort", want=digest))
        elif found[name] != digest:
            hint = "the file has changed since the manifest was written"
            errors.append(DataError(cohort.root / name, "digest", got=found[name], want=digest, hint=hint))
    warnings += [f"{cohort.root / name}: digest: not in {manifest}" for name in found if name not in recorded]
