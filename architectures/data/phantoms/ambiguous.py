"""A synthetic cohort in which the image alone cannot tell scar: two candidates in every wall, and the ECG tells which.

Both candidates are drawn by the same law and are as bright as blood; they lie in the territories of two arteries, and a
coin says which of them is scar. Where the wall is has to be known to see them at all; which one to believe, only the
ECG knows, whose signs are those of ecg.py. Some cases have no ECG, and in some it speaks of another territory than the
scar's, as where files were exchanged.

The older an ECG is, the more often it shows another event than the one that left the scar. Its signs are then as clear
as ever: no beat tells its own age, and only who knows the days can tell how far to believe it.

Beside the files of a cohort (see lge_ecg.py) lie::

    truth.csv     how each case was made, for people and tests; nothing that trains reads it
    beats/        median beats of further subjects, of whom there is no image: the autoencoder can be trained on them

Everything is decided by the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trifuse.architectures.data.layouts.split import Split
from trifuse.architectures.storage.atomic_files import write_text
from trifuse.architectures.storage.segment_maps import AHA_SEGMENTS, ARTERY_SEGMENTS
from trifuse.architectures.storage.text import read_table

from .ecg import RATE_HZ, SyntheticEcg, synthetic_ecg
from .heart_anatomy import MYOCARDIUM, TERRITORY_DEGREES, Bright, Heart
from .scar import (
    INTERVAL_BINS_DAYS,
    Scan,
    draw_ecg_date,
    draw_mri_date,
    scanned,
    write_scan,
    write_scar_cohort,
)

TRUTH, BEATS_FOLDER = "truth.csv", "beats"
ARTERIES = tuple(ARTERY_SEGMENTS)  # in the order of TERRITORY_DEGREES
RIGHT, WRONG, MISSING = "right", "wrong", "none"
"""What a case's ECG says of the scar's territory."""

FIELD_MM = (104.0, 120.0)
LASTING_DAYS = 45.0  # after so many days a share of 1 / e of the ECGs still shows the scar's own event for sure
_AMPLE = (24, 24, 3)  # of columns, rows and slices, at which every case has both candidates
_SCAR = MYOCARDIUM + 1
DECOY = 4  # label of the candidate that is no scar, in `AmbiguousCase` alone
_BLOCK = 60  # so many cases on end hold every bin of days, and every kind of ECG, as often as asked for
_HEALTHY_SHARE = 0.1  # of the beats without an image
_CASE, _PLAN, _BEAT = range(3)  # streams of random numbers
_COLUMNS = ("case_id", "artery", "other_artery", "ecg", "interval_days", "decoy_share")


@dataclass(frozen=True)
class AmbiguousPhantom:
    """What an ambiguous cohort is to be.

    Attributes:
        train, val, test: cases of each part; with these numbers days and ECGs of the test cases are balanced, too.
        size: columns, rows and slices of a case.
        missing: share of the cases without an ECG.
        wrong: share of the cases whose ECG speaks of another territory.
        beats: median beats without an image.
        seed: decides everything.

    Raises:
        ValueError: no case to train on, a negative number or seed, or shares that are none.
    """

    train: int = 220
    val: int = 20
    test: int = 60
    size: tuple[int, int, int] = (64, 64, 6)
    missing: float = 0.1
    wrong: float = 0.05
    beats: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train < 1 or min(self.val, self.test, self.beats) < 0:
            got = f"{self.train}, {self.val}, {self.test} and {self.beats}"
            raise ValueError(f"expected a case to train on, and no negative number of cases or beats, got {got}")
        if self.seed < 0:
            raise ValueError(f"expected a seed of 0 or more, got {self.seed}")
        if not (self.missing >= 0 and self.wrong >= 0 and self.missing + self.wrong <= 1):  # nor NaN
            raise ValueError(
                f"missing and wrong are shares of the cases, together at most 1, got {self.missing} and {self.wrong}"
            )


@dataclass(frozen=True, eq=False)
class AmbiguousCase:
    """A case, before it is written.

    Attributes:
        scan: image and labels; `DECOY` marks the candidate that is no scar.
        artery, other_artery: in whose territories scar and decoy lie.
        ecg: `RIGHT`, `WRONG` or `MISSING`.
        interval_days: between ECG and MRI.
        signal: median beat (12, 600) in mV at 500 Hz; None where it is missing.
    """

    scan: Scan
    artery: str
    other_artery: str
    ecg: str
    interval_days: int
    signal: np.ndarray | None

    @property
    def decoy_share(self) -> float:
        """Which share of both candidates' voxels is the decoy's."""
        bright = self.scan.labels > MYOCARDIUM
        return float((self.scan.labels == DECOY).sum() / max(bright.sum(), 1))


def write_ambiguous_phantom(root: Path, phantom: AmbiguousPhantom | None = None) -> Split:
    """Write the cohort with its split, its truth and its beats below ``root``; ``cases.csv`` comes last.

    Raises:
        ValueError: the cases are so small that one does not show both candidates; nothing is written then.
    """
    root, phantom = Path(root), phantom or AmbiguousPhantom()
    total = phantom.train + phantom.val + phantom.test
    if any(side < enough for side, enough in zip(phantom.size, _AMPLE, strict=True)):
        _refuse_cases_without_candidates(phantom, total)
    names = tuple(f"case{number:03d}" for number in range(1, total + 1))
    held = phantom.train + phantom.val
    split = Split(names[: phantom.train], names[phantom.train : held], names[held:])
    write_beats(root / BEATS_FOLDER, phantom.beats, phantom.seed)
    truth = [",".join(_COLUMNS)]

    def write_case(number: int, name: str) -> Mapping[str, object]:
        case = ambiguous_case(phantom, number)
        share = f"{case.decoy_share:.3f}"
        truth.append(",".join([name, case.artery, case.other_artery, case.ecg, str(case.interval_days), share]))
        if number + 1 == total:
            write_text(root / TRUTH, "\n".join([*truth, ""]))
        return _write_case(root, name, case, np.random.default_rng([phantom.seed, number, _PLAN]))

    return write_scar_cohort(root, split, write_case)


def write_beats(folder: Path, beats: int, seed: int = 0) -> None:
    """Write median beats of subjects without an image, ``beat0001.npz`` and so on, below ``folder``."""
    if beats:
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(beats):
        signal = beat_without_image(seed, number)
        np.savez(folder / f"beat{number + 1:04d}.npz", signal=signal, rate=RATE_HZ)


def read_truth(root: Path) -> dict[str, dict[str, str]]:
    """Return how each case of a written cohort was made: the cells of `TRUTH` by case and column."""
    return {line["case_id"]: line for line in read_table(Path(root) / TRUTH)[1]}


def _refuse_cases_without_candidates(phantom: AmbiguousPhantom, total: int) -> None:
    """Raise unless every case of a small size shows a scar and its like."""
    for number in range(total):
        if not {_SCAR, DECOY} <= {*np.unique(ambiguous_case(phantom, number).scan.labels).tolist()}:
            got, ample = (" x ".join(map(str, size)) for size in (phantom.size, _AMPLE))
            raise ValueError(
                f"size: expected one at which each case shows a scar and its like, got {got}; {ample} does"
            )


def ambiguous_case(phantom: AmbiguousPhantom, number: int) -> AmbiguousCase:
    """Draw a case; it does not depend on how many there are."""
    rng = np.random.default_rng([phantom.seed, number, _CASE])
    days, ecg = _plan(phantom, number, rng)
    scarred, other, third = rng.permutation(ARTERIES).tolist()

    def paint(rng: np.random.Generator, heart: Heart) -> None:
        decoy = heart.brighten(_candidate(rng, other, heart.blood), is_scar=False)
        heart.brighten(_candidate(rng, scarred, heart.blood), is_scar=True)
        heart.labels[decoy & (heart.labels == MYOCARDIUM)] = DECOY

    scan = scanned(rng, number, phantom.size, paint, FIELD_MM)
    told = str(rng.choice([other, third])) if ecg == WRONG else scarred
    signal = None if ecg == MISSING else territory_ecg(rng, told, days).median_beat(rng)
    return AmbiguousCase(scan, scarred, other, ecg, days, signal)


def beat_without_image(seed: int, number: int) -> np.ndarray:
    """Draw the median beat (12, 600) of a subject with a scar anywhere, or none, of any age."""
    rng = np.random.default_rng([seed, number, _BEAT])
    days = float(rng.uniform(0, INTERVAL_BINS_DAYS[-1][1]))
    if rng.random() < _HEALTHY_SHARE:
        return synthetic_ecg(rng, np.zeros(AHA_SEGMENTS)).median_beat(rng)
    return territory_ecg(rng, str(rng.choice(ARTERIES)), days).median_beat(rng)


def territory_ecg(rng: np.random.Generator, artery: str, interval_days: float) -> SyntheticEcg:
    """Draw the ECG of a subject with a scar somewhere in an artery's territory, so many days from the MRI.

    With the days it shows ever more often an event in any of the territories, drawn evenly, that the MRI does not show.
    It says nothing of the scar's size: the image must not learn from it which candidate fits.
    """
    if rng.random() > np.exp(-((interval_days / LASTING_DAYS) ** 2)):
        artery = str(rng.choice(ARTERIES))
    scar = np.zeros(AHA_SEGMENTS)
    segments = np.array(ARTERY_SEGMENTS[artery]) - 1
    scar[segments] = rng.uniform(0.4, 1.0) * rng.uniform(0.6, 1.0, len(segments))
    return synthetic_ecg(rng, scar)


def _plan(phantom: AmbiguousPhantom, number: int, rng: np.random.Generator) -> tuple[int, str]:
    """Return days and kind of ECG of a case: of all cases of a block, each as many as asked for, in random order."""
    block, place = divmod(number, _BLOCK)
    plan = np.random.default_rng([phantom.seed, block, _PLAN])
    first, last = INTERVAL_BINS_DAYS[plan.permutation(_BLOCK)[place] % len(INTERVAL_BINS_DAYS)]
    rank = (plan.permutation(_BLOCK)[place] + 0.5) / _BLOCK
    kind = MISSING if rank < phantom.missing else WRONG if rank < phantom.missing + phantom.wrong else RIGHT
    return int(rng.integers(first, last + 1)), kind


def _candidate(rng: np.random.Generator, artery: str, blood: float) -> Bright:
    """Draw a candidate that stays within its territory: no two overlap."""
    return Bright(
        degrees=TERRITORY_DEGREES[ARTERIES.index(artery)] + rng.uniform(-10, 10),
        level=rng.uniform(0.25, 0.6),
        half_degrees=rng.uniform(34, 48),
        half_level=rng.uniform(0.4, 0.7),
        transmurality=rng.uniform(0.6, 1.0),
        value=blood * rng.uniform(0.97, 1.03),
    )


def _write_case(root: Path, name: str, case: AmbiguousCase, rng: np.random.Generator) -> Mapping[str, object]:
    """Write image, labels and median beat of a case; return its line of the table."""
    labels = np.where(case.scan.labels == DECOY, MYOCARDIUM, case.scan.labels).astype(np.uint8)
    mri = draw_mri_date(rng)
    line = {**write_scan(root, name, replace(case.scan, labels=labels)), "mri_date": mri.isoformat()}
    if case.signal is None:
        return line
    file = f"ecg/{name}.npy"
    np.save(root / file, case.signal)
    day = draw_ecg_date(rng, mri, case.interval_days)
    return {**line, "ecg_path": file, "ecg_rate_hz": RATE_HZ, "ecg_date": day.isoformat()}
