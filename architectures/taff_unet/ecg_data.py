"""Which ECGs the autoencoder is trained on, and which of them train, validate and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from trifuse.architectures.data.ecg.beat_dataset import BeatSource
from trifuse.architectures.data.ecg.files import digest_of_samples
from trifuse.architectures.data.ecg.ptbxl import TABLE, find_ecgs, open_ptbxl
from trifuse.architectures.data.ecg.wfdb_header import require_reader
from trifuse.architectures.data.layouts import lge_ecg
from trifuse.architectures.data.layouts.cohort import Cohort, Split
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.split import read_split, verify_split
from trifuse.architectures.storage.file_names import real_path
from trifuse.architectures.storage.text import listed, repeated
from trifuse.kernels import DataError
from trifuse.kernels.choices import check_choices

Kind = Literal["auto", "ptbxl", "cohort", "records"]
Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
COHORT_TABLE = "cases.csv"


@dataclass(frozen=True)
class EcgData:
    """Which ECGs a run uses.

    Attributes:
        root: folder of PTB-XL, of a cohort, or of records.
        kind: which of these; ``"auto"`` tells by the tables that are there. Of a cohort only the training cases' ECGs
            are read. Records all train, but for those that the patterns below name.
        also: further folders of records, which train, too; one whose name is taken is called by its folder as well.
        val_records: patterns of the records that choose the best epoch, whatever their fold, and
        test_records: of those that the run never sees before its report.
        split: JSON file that splits a cohort which brings no split.
        min_beats: heart beats that a median beat needs.

    Raises:
        ValueError: an unknown kind, no beats, or records named of a cohort.
    """

    root: str = ""
    kind: Kind = "auto"
    also: tuple[str, ...] = ()
    val_records: tuple[str, ...] = ()
    test_records: tuple[str, ...] = ()
    split: str | None = None
    min_beats: int = 3

    def __post_init__(self) -> None:
        check_choices(self)
        if self.min_beats < 1:
            raise ValueError(f"min_beats must be at least 1, got {self.min_beats}")

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """Translate what older versions wrote: a cohort was called a study."""
        return {**values, "kind": "cohort"} if values.get("kind") == "study" else values

    @property
    def found_kind(self) -> Kind:
        """What ``root`` is."""
        if self.kind != "auto":
            return self.kind
        tables: dict[str, Kind] = {TABLE: "ptbxl", COHORT_TABLE: "cohort"}
        return next((kind for table, kind in tables.items() if (Path(self.root) / table).is_file()), "records")

    def sources(self) -> dict[Part, list[BeatSource]]:
        """Find the ECGs of each part.

        Raises:
            DataError: there are none, a pattern names none, a cohort has no split, or an ECG stands in two parts.
        """
        parts, further = self._found()
        said = {source.path: source.record for source in (*chain(*parts.values()), *further)}
        there = [source.path for sources in parts.values() for source in sources]
        if twice := set(repeated(str(real_path(path)) for path in (*{*there}, *(source.path for source in further)))):
            want = "folders without records that are used already, be it to test"
            raise DataError(self.root, "also", got=f"{listed(sorted(twice))} once more", want=want)
        further = _told_apart(further, [source.record for source in chain(*parts.values())])
        parts["train"] += further
        named: list[tuple[Part, tuple[str, ...]]] = [("test", self.test_records), ("val", self.val_records)]
        for part, patterns in named:
            _move(parts, part, patterns, said)
        if not parts["train"]:
            raise DataError(self.root, "training records", got="none", want="at least one")
        self._refuse_copies(parts, further)
        return parts

    def require_reader(self) -> None:
        """Look for what reading the ECGs needs, by their names alone.

        Raises:
            MissingExtra: wfdb is not installed, and one of them is a WFDB record.
        """
        with suppress(DataError, OSError):  # which `sources` raises
            parts, further = self._found()
            require_reader(source.path for source in (*chain(*parts.values()), *further))

    def _found(self) -> tuple[dict[Part, list[BeatSource]], list[BeatSource]]:
        """Return the ECGs of each part, and further ones to train on."""
        find = {"ptbxl": self._from_ptbxl, "cohort": self._from_cohort, "records": self._from_folder}
        return find[self.found_kind](), [source for folder in self.also for source in _records_of(Path(folder))]

    def _refuse_copies(self, parts: dict[Part, list[BeatSource]], further: Sequence[BeatSource]) -> None:
        """Refuse ECGs of the same samples in two parts, of a cohort's other cases too; PTB-XL's own folds are given.

        Raises:
            DataError: naming all of them.
        """
        kind = self.found_kind
        if kind == "ptbxl" and not further:
            return
        held = self._cohort_with_split() if kind == "cohort" else None
        others = [] if held is None else _ecgs_of(held[0], (*held[1].val, *held[1].test))
        seen: dict[str, tuple[str, BeatSource]] = {}
        problems = []
        named: list[tuple[str, list[BeatSource]]] = [*parts.items(), ("a held-out case", others)]
        for part, sources in named:
            for source in sources:
                first_part, first = seen.setdefault(digest_of_samples(source.path), (part, source))
                if first_part != part and (kind != "ptbxl" or first in further or source in further):
                    got = f"{first.path} in {first_part} and {source.path} in {part}"
                    problems.append(DataError(self.root, "same ECG in two parts", got=got, want="one part"))
        if problems:
            raise DataError.merge(problems)

    def _from_ptbxl(self) -> dict[Part, list[BeatSource]]:
        table = open_ptbxl(Path(self.root))
        return {part: [BeatSource(str(r.ecg_id), r.path) for r in table.part(part)] for part in PARTS}

    def _from_folder(self) -> dict[Part, list[BeatSource]]:
        return {"train": _records_of(Path(self.root)), "val": [], "test": []}

    def _from_cohort(self) -> dict[Part, list[BeatSource]]:
        cohort, split = self._cohort_with_split()
        return {"train": _ecgs_of(cohort, split.train), "val": [], "test": []}

    def _cohort_with_split(self) -> tuple[Cohort, Split]:
        cohort = open_cohort(Path(self.root), lge_ecg.LAYOUT.name)
        split = read_split(Path(self.split), cohort) if self.split else cohort.split
        if split is None:
            hint = "name the split that the segmentation is trained with: data.split"
            raise DataError(self.root, "split", got="none", want="a split, lest test cases be fitted", hint=hint)
        return cohort, verify_split(cohort, split)


def _ecgs_of(cohort: Cohort, case_ids: Sequence[str]) -> list[BeatSource]:
    cases = [(name, cohort.case(name).clinical) for name in case_ids]
    return [
        BeatSource(name, clinical.ecg, clinical.ecg_rate_hz)
        for name, clinical in cases
        if clinical is not None and clinical.ecg is not None
    ]


def _records_of(folder: Path) -> list[BeatSource]:
    root = folder if folder.is_dir() else folder.parent
    return [BeatSource(path.relative_to(root).with_suffix("").as_posix(), path) for path in find_ecgs(folder)]


def _told_apart(sources: Sequence[BeatSource], taken: Sequence[str]) -> list[BeatSource]:
    """Put as much of its folder as needed before the name of a record that another has already."""
    known, named = {*taken}, []
    for source in sources:
        above = real_path(source.path).parent.parts
        names = [source.record, *("/".join((*above[-depth:], source.path.stem)) for depth in range(1, len(above) + 1))]
        named.append(replace(source, record=next(name for name in names if name not in known)))
        known.add(named[-1].record)
    return named


def _move(parts: dict[Part, list[BeatSource]], part: Part, patterns: Sequence[str], said: Mapping[Path, str]) -> None:
    """Move the records that a pattern names to a part, from any other; by their names with and without a folder."""
    for pattern in patterns:
        named = [
            (other, source)
            for other in PARTS
            for source in parts[other]
            if fnmatch(source.record, pattern) or fnmatch(said[source.path], pattern)
        ]
        if not named:
            known = [source.record for other in PARTS for source in parts[other]]
            raise DataError(pattern, "record", got="none of that name", want=f"one of {', '.join(known[:12])}")
        for other, source in named:
            parts[other].remove(source)
            parts[part].append(source)
