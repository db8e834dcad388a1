"""Which patients train, which validate and which test: drawn once, written down, checked whenever it is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np

from trifuse.architectures.data.ecg.files import digest_of_samples
from trifuse.architectures.storage.atomic_files import write_json
from trifuse.architectures.storage.file_names import composed
from trifuse.architectures.storage.record import take_digest, write_record
from trifuse.architectures.storage.text import listed, natural_key, parse_json, read_parsed
from trifuse.kernels.errors import DataError

from .cohort import Cohort, Split


def split_patients(
    cohort: Cohort,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int = 42,
    *,
    val_from: Literal["all", "remaining"] = "all",
) -> Split:
    """Draw a split by patient, so that all images of a patient are in the same part.

    Args:
        cohort: the cases.
        fractions: of the patients, for training, validation and test. Validation and test are rounded to whole
            patients (at least one if the fraction is above zero), the rest trains: 60 patients give 42/6/12.
        seed: of the shuffle; the order of files on disk has no influence.
        val_from: whether the validation fraction is taken of all patients, or of those that the test set leaves
            (60 patients then give 43/5/12).

    Raises:
        DataError: the fractions do not add up to 1, or there are too few patients.
    """
    if abs(sum(fractions) - 1) > 1e-6 or min(fractions) < 0 or fractions[0] == 0:
        raise DataError(cohort.root, "split fractions", got=fractions, want="three fractions, train > 0, sum 1")
    patients = sorted({case.patient for case in cohort.cases}, key=natural_key)
    test = _whole(fractions[2], len(patients))
    val = _whole(fractions[1], len(patients) if val_from == "all" else len(patients) - test)
    if len(patients) - test - val < 1:
        got = f"{len(patients)} patients, of which {val} would validate and {test} test"
        raise DataError(cohort.root, "split", got=got, want="at least one patient to train on")
    order = np.random.default_rng(seed).permutation(len(patients))
    shuffled = [patients[index] for index in order]
    parts = set(shuffled[test + val :]), set(shuffled[test : test + val]), set(shuffled[:test])
    train_ids, val_ids, test_ids = (
        tuple(case.case_id for case in cohort.cases if case.patient in part) for part in parts
    )
    return Split(train_ids, val_ids, test_ids)


def hold_out(cohort: Cohort, split: Split, patients: int, seed: int = 42) -> Split:
    """Let some patients of the training cases validate, with all of their images.

    Args:
        cohort: the cases.
        split: one without validation cases.
        patients: how many.
        seed: of the draw; the order of files on disk has no influence.

    Raises:
        DataError: the split has validation cases, or nobody would be left to train on.
    """
    if split.val:
        got, hint = f"{len(split.val)} validation cases in the split", "leave out val_patients, or choose another split"
        raise DataError(cohort.root, "val_patients", got=got, want="a split without any", hint=hint)
    known = sorted({cohort.case(case_id).patient for case_id in split.train}, key=natural_key)
    if not 0 < patients < len(known):
        want = f"1 to {len(known) - 1}, so that some of the {len(known)} training patients are left to train on"
        raise DataError(cohort.root, "val_patients", got=patients, want=want)
    held = {known[index] for index in np.random.default_rng(seed).permutation(len(known))[:patients]}
    val = tuple(case_id for case_id in split.train if cohort.case(case_id).patient in held)
    train = tuple(case_id for case_id in split.train if cohort.case(case_id).patient not in held)
    return replace(split, train=train, val=val)


def verify_split(cohort: Cohort, split: Split) -> Split:
    """Return the split if it fits the cohort and leaks nothing, or raise with everything that is wrong.

    Raises:
        DataError: a case is unknown, named twice or not named at all; a patient, or one and the same image file or ECG,
            stands in two parts; or nothing is left to train on.
    """
    parts = {name: ids for name, ids in asdict(split).items() if name != "unused"}
    named = Counter(case_id for ids in asdict(split).values() for case_id in ids)
    known = {case.case_id for case in cohort.cases}
    problems = [
        DataError(cohort.root, f"split: case {case_id!r}", got=f"named {times} times", want="once")
        for case_id, times in sorted(named.items(), key=lambda pair: natural_key(pair[0]))
        if times > 1
    ]
    if strangers := _listed_cases(set(named) - known):
        problems.append(DataError(cohort.root, "split", got=f"unknown cases {strangers}", want="known ones"))
    if left := _listed_cases(known - set(named)):
        hint = 'add them to a part, or to "unused"'
        problems.append(DataError(cohort.root, "split", got=f"no part for {left}", want="all", hint=hint))
    if not split.train:
        problems.append(DataError(cohort.root, "split", got="no training case", want="at least one"))
    if not problems:
        problems = _leaks(cohort, parts)
    if problems:
        raise DataError.merge(problems)
    return split


def _listed_cases(names: Iterable[str]) -> str:
    return listed(map(repr, sorted(names, key=natural_key)))


def write_split(path: Path, split: Split, *, sealed: bool = False) -> None:
    """Write a split as JSON; one that nobody is to edit is ``sealed`` by a digest of itself."""
    (write_record if sealed else write_json)(path, {part: list(ids) for part, ids in asdict(split).items()})


def read_split(path: Path, cohort: Cohort) -> Split:
    """Read a split from JSON and verify that it fits the cohort.

    Raises:
        DataError: the file is unreadable, or ``verify_split`` finds something.
        CheckpointError: it is sealed, and has changed.
    """
    try:
        value = read_parsed(Path(path), parse_json)
    except OSError as error:
        raise DataError(path, "file", got=error.strerror, want="a split written by trifuse, or by hand") from error
    except ValueError as error:
        raise DataError(path, "JSON", got=str(error), want="valid JSON") from error
    if isinstance(value, dict) and (damage := take_digest(Path(path), value)):
        raise damage
    allowed, required = {"train", "val", "test", "unused"}, {"train", "val", "test"}
    if not isinstance(value, dict) or not required <= set(value) <= allowed:
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(path, "keys", got=got, want='"train", "val", "test" and perhaps "unused"')
    for part, ids in value.items():
        if not isinstance(ids, list) or not all(isinstance(case_id, str) for case_id in ids):
            raise DataError(path, part, got=ids, want="a list of case ids")
    return verify_split(cohort, Split(**{part: tuple(map(composed, ids)) for part, ids in value.items()}))


def _whole(fraction: float, count: int) -> int:
    """Round half up, and to at least one if there is to be any."""
    return max(int(fraction * count + 0.5), 1) if fraction > 0 else 0


def _leaks(cohort: Cohort, parts: dict[str, tuple[str, ...]]) -> list[DataError]:
    """Find patients, and images and ECGs with the same bytes, that stand in two parts."""
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    problems = []
    for part, ids in parts.items():
        for case in map(cohort.case, ids):
            keys = [("patient", case.patient), ("image", case.image_digest())]
            if case.clinical is not None and case.clinical.ecg is not None:
                keys.append(("ECG", digest_of_samples(case.clinical.ecg)))
            for key in keys:
                first_part, first_id = seen.setdefault(key, (part, case.case_id))
                if first_part != part:
                    got = f"{first_id} in {first_part} and {case.case_id} in {part}"
                    problems.append(DataError(cohort.root, f"same {key[0]} in two parts", got=got, want="one part"))
    return problems
